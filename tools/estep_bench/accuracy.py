"""How far each precision is from fp64 on data that is easy and hard, and whether ``auto`` knows."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from streamgmm.estep import bind
from streamgmm.frame import frame_of
from streamgmm.mixture import Mixture
from streamgmm.precision import check_sample, choose_precision

from .errors import CONTRACT, errors_of, exact_of
from .session import Record, Session

ACCURACY_DATA: dict[str, dict[str, float]] = {
    "centred, unit noise": {},
    "offset 10": {"offset": 10.0},
    "noise 0.05": {"noise": 0.05},
    "overlapping": {"spread": 0.3},
    "offset 10, noise 0.1, spread 0.1": {"offset": 10.0, "noise": 0.1, "spread": 0.1},
}
SCALINGS: dict[str, float | None] = {"as is": 1.0, "1e-3": 1e-3, "1e3": 1e3, "spread over 1e4": None}


def draw_mixture(
    covariance_type: str, n: int, k: int, d: int, scale: np.ndarray, device: torch.device,
    *, offset: float = 0.0, noise: float = 1.0, spread: float = 1.0,
) -> tuple[Tensor, Mixture]:  # fmt: skip
    """Float32 rows of a mixture whose means have deviation ``spread`` about ``offset``; feature i times scale[i]."""
    rng = np.random.default_rng(0)
    generator = torch.Generator(device=device).manual_seed(0)
    means = (offset + spread * rng.standard_normal((k, d))) * scale
    variances = noise**2 * rng.uniform(0.7, 1.4, {"spherical": (k, 1), "diag": (k, d), "tied": (1, d), "full": (k, d)}[
        covariance_type
    ])  # fmt: skip
    if covariance_type in ("spherical", "diag"):
        factors = np.sqrt(variances) * scale * np.ones((k, d))
        covariances = factors[:, 0] ** 2 if covariance_type == "spherical" else factors**2
    else:
        rotations = np.linalg.qr(rng.standard_normal((len(variances), d, d)))[0]
        factors = scale[:, None] * rotations * np.sqrt(variances)[:, None, :]
        covariances = factors @ factors.transpose(0, 2, 1)
        covariances = covariances[0] if covariance_type == "tied" else covariances
    weights = rng.uniform(0.5, 1.5, k)
    mixture = Mixture(weights / weights.sum(), means, covariances, covariance_type)

    labels = torch.randint(0, k, (n,), generator=generator, device=device)
    by_label, centres = torch.tensor(factors, device=device), torch.tensor(means, device=device)
    rows = torch.empty((n, d), device=device)
    for own, out in zip(labels.split(16_384), rows.split(16_384), strict=True):
        z = torch.randn((len(own), d), generator=generator, device=device).double()
        if by_label.ndim == 2:
            deviations = by_label[own] * z
        elif len(by_label) == 1:
            deviations = z @ by_label[0].T
        else:
            deviations = torch.einsum("nij,nj->ni", by_label[own], z)
        out.copy_(deviations.add_(centres[own]))
    return rows, mixture


def accuracy(session: Session) -> list[Record]:
    """Errors on every data set × scaling × covariance type × precision, and what ``auto`` chooses there."""
    n, k, d = min(200_000, session.rows), 256, 64
    k = min(k, max(2, n // 16))
    spread = 10.0 ** np.random.default_rng(2).permutation(np.linspace(-2, 2, d))
    records = []
    for kind in ("spherical", "diag", "tied", "full"):
        for data, recipe in ACCURACY_DATA.items():
            for scaling, factor in SCALINGS.items():
                if factor is None and kind == "spherical":
                    continue
                labels = {"covariance_type": kind, "data": data, "scaling": scaling}
                if not session.wants(labels):
                    continue
                scale = spread if factor is None else np.full(d, factor)
                measure = partial(_errors_on, session.device, kind, (n, k, d), scale, recipe)
                records.append(session.attempt(labels, measure))
    return records


def _errors_on(
    device: torch.device, kind: str, size: tuple[int, int, int], scale: np.ndarray, recipe: dict[str, float]
) -> Record:
    rows, mixture = draw_mixture(kind, *size, scale, device, **recipe)
    sample = rows[:32_768]
    frame = frame_of(sample.cpu().numpy(), kind)
    record: Record = {"auto": choose_precision(mixture, frame, "medium", check_sample(sample, sample.device), 1)}
    exact = exact_of(mixture, frame, rows)
    faults = []
    for precision in CONTRACT:
        errors = errors_of(bind(mixture, frame, precision, device, 1), rows, exact)
        record |= {f"{precision}_nats": errors.nats, f"{precision}_statistic": errors.statistic}
        # What `medium` cannot hold, `auto` must have moved on from; what `high` promises holds everywhere.
        if not errors.within(CONTRACT[precision]) and (precision == "high" or record["auto"] == "medium"):
            faults.append(precision)
    return record | {"verdict": "ok" if not faults else "beyond contract: " + ", ".join(faults)}
