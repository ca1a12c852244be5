"""Calls that between them make every launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from streamgmm.ann.listing import choice_of
from streamgmm.ann.policies import Policy
from streamgmm.frame import Frame
from streamgmm.kernels import Kernel
from streamgmm.kernels.fused import full_kernel
from streamgmm.kernels.fused.kernel import TritonKernel
from streamgmm.kernels.kept import KeptRows, RunKernel
from streamgmm.kernels.neighbours.search import Search
from streamgmm.mixture import Mixture, covariance_shape
from streamgmm.statistics import Statistics

from .launches import Launch, recorded

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
_ROWS = 300
# Tight enough that fp16 coefficients need exponents of their own.
_TIGHT = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of one kernel.

    Attributes
    ----------
    covariance_type, precision, n_features, architecture : what chooses the kernel and its tiles
        ``none`` has no mixture: the nearest of some centroids.
    call : str
        ``sums`` accumulates, ``rows`` is log p of each row, ``top`` ranks two components; ``hard`` and ``hard top``
        assign. ``weighted`` and ``hard weighted`` are sums of weighted rows, ``scaled`` those of tight components,
        ``kept`` those of rows that stayed on the device, and what keeps them.
        ``nearest M`` finds M centroids, ``lists M POLICY`` a row's lists among them.
    stored : str
        The rows' type, as torch calls it.
    """

    covariance_type: str
    precision: str
    n_features: int
    architecture: str
    call: str
    stored: str


def cases(architecture: str, features: tuple[int, ...], every: bool) -> list[Case]:
    """Sums of every type × precision × shape, and the ranking at the first; ``every`` adds calls and stored types."""
    found = []
    for kind, precision in _KINDS:
        for d in features:
            if kind == "full" and d > 256:
                continue
            calls = _CALLS[kind] if every else _CALLS[kind][: 2 if d == features[0] else 1]
            calls = (*calls, "kept") if (kind, precision) in _KEEPING else calls
            found += [Case(kind, precision, d, architecture, call, "float32") for call in calls]
            if every and d == features[0]:
                names = [str(dtype).removeprefix("torch.") for dtype in STORED if dtype != torch.float32]
                found += [Case(kind, precision, d, architecture, "rows", name) for name in names]
    for d in features:
        found += [Case("none", "medium", d, architecture, call, "uint8") for call in _NEAREST[: None if every else 2]]
    return found


_KINDS = [(kind, precision) for precision in ("medium", "high") for kind in ("spherical", "diag", "tied")]
_KINDS.append(("full", "medium"))
_KEEPING = [("spherical", "medium"), ("diag", "medium")]
_NEAREST = ("nearest 16", "lists 16 air", "nearest 1", "nearest 2", "lists 16 soar", "lists 2 top2", "lists 1 top1")
_SOFT = ("sums", "top", "rows", "weighted")
_CALLS = dict.fromkeys(("spherical", "diag", "tied"), (*_SOFT, "scaled", "hard", "hard weighted", "hard top"))
_CALLS["full"] = _SOFT


def launches_of(case: Case) -> list[Launch]:
    """What the call launches. The host code runs on a CPU, with rows of zeros and without a single result."""
    if case.covariance_type == "none":
        return _launches_of_search(case)
    hard = case.call.startswith("hard")
    # Enough components that `full` screens its pairs.
    k = 128 if case.covariance_type == "full" else 1024
    kernel: Kernel = (
        full_kernel.FullKernel()
        if case.covariance_type == "full"
        else TritonKernel(case.precision, hard, case.architecture)
    )
    mixture = _mixture(case.covariance_type, k, case.n_features, _TIGHT if case.call == "scaled" else 1.0)
    frame = Frame(np.zeros(case.n_features), np.ones(case.n_features))
    rows = torch.zeros((_ROWS, case.n_features), dtype=getattr(torch, case.stored))
    with recorded() as launches, patch.object(full_kernel, "architecture_of", lambda device: case.architecture):
        parameters = kernel.parameters(mixture, frame, rows.device)
        for step in _steps(case.call):
            step(kernel, rows, parameters, mixture)
    return launches


def _launches_of_search(case: Case) -> list[Launch]:
    points = torch.randn((4096, case.n_features), generator=torch.Generator().manual_seed(0))
    rows = torch.zeros((_ROWS, case.n_features), dtype=getattr(torch, case.stored))
    origin = torch.zeros(case.n_features, dtype=torch.float64)
    call, m, *policy = case.call.split()
    with recorded() as launches:
        search = Search.of(points, origin, case.architecture)
        if call == "lists":
            search.lists(rows, int(m), choice_of(Policy(*policy), int(m)))
        else:
            search(rows, int(m))
    return launches


Step = Callable[[Kernel, Tensor, Any, Mixture], object]


def _steps(call: str) -> Iterator[Step]:
    if call.endswith("top"):
        yield lambda kernel, rows, parameters, _: kernel.top(rows, parameters, 2)
    elif call == "rows":
        yield lambda kernel, rows, parameters, _: kernel.log_likelihood(rows, parameters)
    elif call == "kept":
        yield lambda kernel, rows, parameters, mixture: kernel.accumulate(
            _kept(kernel, rows, parameters), parameters, _empty(mixture)
        )
    else:
        weights = torch.ones(_ROWS) if call.endswith("weighted") else None
        yield lambda kernel, rows, parameters, mixture: kernel.accumulate(rows, parameters, _empty(mixture), weights)


def _kept(kernel: Kernel, rows: Tensor, parameters: Any) -> KeptRows:
    assert isinstance(kernel, RunKernel)
    form = kernel.kept_form(parameters)
    assert form is not None
    place = torch.zeros(form.size(len(rows)), dtype=torch.uint8)
    form.narrow(rows, place)
    return form.rows(place, len(rows), lambda first, last: rows[first:last])


def _mixture(covariance_type: str, k: int, d: int, variance: float) -> Mixture:
    unit = np.eye(d) if covariance_type in ("tied", "full") else np.ones(())
    covariances = variance * np.broadcast_to(unit, covariance_shape(covariance_type, k, d))
    return Mixture(np.full(k, 1 / k), np.random.default_rng(0).standard_normal((k, d)), covariances, covariance_type)


def _empty(mixture: Mixture) -> Statistics:
    origin = torch.zeros(mixture.n_features, dtype=torch.float64)
    return Statistics.zeros(mixture.covariance_type, mixture.n_components, origin)
