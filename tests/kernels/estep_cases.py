"""Mixtures, data and comparisons shared by the interpreter's and the GPU's tests of the E-step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgmm.frame import Frame, frame_of
from streamgmm.kernels import Kernel
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

TYPES = ("spherical", "diag", "tied")
MODES = ("medium", "high")

each_kernel = pytest.mark.parametrize(
    ("covariance_type", "precision"),
    [(t, p) for t in TYPES for p in MODES],
    ids=[f"{t}-{p}" for t in TYPES for p in MODES],
)


STATISTICS_LIMIT = {"medium": 1e-3, "high": 1e-5}
"""Norm-wise relative error of counts, sums and scatter about the exact means: the contract of each precision."""


@dataclass(frozen=True)
class Case:
    """Rows drawn from a mixture, and the frame they are seen in."""

    rows: Tensor
    mixture: Mixture
    frame: Frame


@dataclass(frozen=True)
class Errors:
    """What separates a kernel from fp64, about each component's own mean."""

    log_likelihood: float
    counts: float
    sums: float
    scatter: float

    @property
    def statistics(self) -> float:
        return max(self.counts, self.sums, self.scatter)


def draw(
    covariance_type: str,
    n: int,
    k: int,
    d: int,
    device: torch.device,
    *,
    offset: float = 0.0,
    noise: float = 1.0,
    spread: float = 3.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Rows of a mixture whose means have deviation ``spread`` about ``offset``; everything times ``scale``."""
    generator = torch.Generator(device=device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    means = (offset + spread * rng.standard_normal((k, d))) * scale
    covariances = (noise * scale) ** 2 * _unit_covariances(covariance_type, k, d, rng)
    weights = rng.uniform(0.5, 1.5, k)
    mixture = Mixture(weights / weights.sum(), means, covariances, covariance_type)
    labels = torch.randint(0, k, (n,), generator=generator, device=device)
    rows = torch.randn((n, d), generator=generator, dtype=torch.float32, device=device).double()
    if covariance_type == "tied":
        rows = rows @ torch.tensor(np.linalg.cholesky(covariances).T, device=device)
    else:
        rows = rows.mul_(torch.tensor(np.sqrt(covariances), device=device).reshape(k, -1)[labels])
    rows = rows.add_(torch.tensor(means, device=device)[labels]).to(dtype)
    sample = np.concatenate([rows[:4096].double().cpu().numpy(), means])
    return Case(rows, mixture, frame_of(sample, covariance_type))


def _unit_covariances(covariance_type: str, k: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """Covariances near one; correlated ones for ``tied``."""
    if covariance_type == "tied":
        factor = rng.standard_normal((d, d)) / np.sqrt(d)
        return np.asarray(0.5 * np.eye(d) + 0.5 * factor @ factor.T)
    return rng.uniform(0.7, 1.4, (k,) if covariance_type == "spherical" else (k, d))


def sums_of(kernel: Kernel, case: Case, pieces: list[int] | None = None, weights: Tensor | None = None) -> Statistics:
    """Statistics in the frame's coordinates, the rows given in ``pieces``."""
    m, device = case.mixture, case.rows.device
    shift = torch.zeros(m.n_features, dtype=torch.float64, device=device)
    statistics = Statistics.zeros(m.covariance_type, m.n_components, shift, device)
    parameters = kernel.parameters(m, case.frame, device)
    sizes = pieces or [len(case.rows)]
    own = [None] * len(sizes) if weights is None else list(weights.split(sizes))
    for piece, some in zip(case.rows.split(sizes), own, strict=True):
        kernel.accumulate(piece, parameters, statistics, some)
    return kernel.finish(statistics, parameters)


def log_likelihood_of(kernel: Kernel, case: Case) -> Tensor:
    return kernel.log_likelihood(case.rows, kernel.parameters(case.mixture, case.frame, case.rows.device))


def errors_of(kernel: Kernel, case: Case) -> Errors:
    """Against `TiledKernel` in fp64, which its own test holds against the reference."""
    oracle = TiledKernel(torch.float64)
    got, exact = sums_of(kernel, case), sums_of(oracle, case)
    exact_rows = log_likelihood_of(oracle, case)
    got_rows = log_likelihood_of(kernel, case)
    assert got.n_rows == len(case.rows)
    assert abs(float(got.counts.sum()) - len(case.rows)) < 0.5
    torch.testing.assert_close(got.log_likelihood, got_rows.sum(), rtol=1e-12, atol=1e-9)

    # Σ r x' about the origin hides what the M-step sees: compare about the exact means, one shift a component.
    means = exact.sums / exact.counts.clamp_min(1e-9)[:, None]
    if case.mixture.covariance_type == "tied":
        got_scatter, exact_scatter = _within(got, means), _within(exact, means)
        deviation = float((exact_scatter.trace().clamp_min(0) * exact.counts).sum().sqrt())
        sums = (got.sums - exact.sums) - (got.counts - exact.counts)[:, None] * means
    else:
        got, exact = got.recentre(means), exact.recentre(means)
        got_scatter, exact_scatter = got.scatter, exact.scatter
        deviation = float((exact_scatter.clamp_min(0).reshape(len(means), -1).sum(1) * exact.counts).sum().sqrt())
        sums = got.sums - exact.sums
    return Errors(
        log_likelihood=float((got_rows - exact_rows).abs().mean()),
        counts=relative(got.counts, exact.counts),
        # Σ r (x − mean) is zero: its scale is what Cauchy and Schwarz allow, √(Σr · Σr‖x − mean‖²).
        sums=float(sums.norm()) / max(deviation, 1e-30),
        scatter=relative(got_scatter, exact_scatter),
    )


def _within(statistics: Statistics, means: Tensor) -> Tensor:
    """Σ r (x − m)(x − m)ᵀ of ``tied`` about one mean a component, (D, D)."""
    cross = statistics.sums.T @ means
    return statistics.scatter - cross - cross.T + means.T @ (statistics.counts[:, None] * means)


def log_likelihood_limit(case: Case, precision: str) -> float:
    """Mean |Δ log p| in nats that the rounding of a precision explains, from the case itself.

    ``medium`` rounds x' and μ' to u = 2⁻¹¹ of themselves, which moves log p of a row's component by about
    u·√Σ_d ((x'−μ')p(|x'|+|μ'|))², and each variance likewise, u·√D; tensor cores also truncate the fp32 sum, of
    magnitude M, at each of the D/16 steps of a product. Every precision adds fp32 terms whose magnitudes sum to M, each
    to 2⁻²⁴, with a few roundings a term.
    """
    mixture, frame = case.mixture, case.frame
    x = frame.apply(case.rows, torch.float64)
    oracle = TiledKernel(torch.float64)
    parameters = oracle.parameters(mixture, frame, case.rows.device)
    best = torch.cat(list(oracle.map_joint(lambda joint: joint.argmax(0), case.rows, parameters)))
    means = torch.as_tensor((mixture.means - frame.shift) * frame.scale, device=x.device)
    if mixture.covariance_type == "tied":
        factor = torch.as_tensor(mixture.precisions_cholesky / frame.scale[:, None], device=x.device)
        x, means = x @ factor, (means @ factor)[best]
        precisions = torch.ones((len(x), 1), dtype=torch.float64, device=x.device)
    else:
        means = means[best]
        variances = mixture.covariances.reshape(mixture.n_components, -1) * frame.scale**2
        precisions = torch.as_tensor(1 / variances, device=x.device)[best]
    constants = parameters.constants.double()[best, 0]
    terms = (x * precisions * means).abs().sum(1) + 0.5 * (x**2 * precisions).sum(1) + constants.abs()
    resolution = 2.0**-24 * float(terms.mean())
    limit = 4 * resolution
    if precision == "medium":
        moved = ((x - means) * precisions * (x.abs() + means.abs())).square().sum(1).sqrt()
        limit += 2.0**-11 * (float(moved.mean()) + x.shape[1] ** 0.5) + x.shape[1] / 16 * resolution
    return limit


def check(kernel: Kernel, case: Case) -> Errors:
    """The errors of a kernel, after holding them against what its precision promises."""
    precision = getattr(kernel, "precision", "high")
    errors = errors_of(kernel, case)
    assert errors.log_likelihood <= log_likelihood_limit(case, precision), errors
    assert errors.counts <= STATISTICS_LIMIT[precision], errors
    return errors


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def same_bits(a: Statistics, b: Statistics) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("counts", "sums", "scatter", "log_likelihood")
    )
