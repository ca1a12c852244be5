"""The E-step over rows on a device: a mixture bound to its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Kernel, Problem, Run, select_kernel
from streamgmm.kernels.kept import KeptForm, KeptRows, RunKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics


@dataclass(frozen=True, eq=False)
class BoundMixture:
    """A mixture in the form its kernel multiplies by; made once a pass. ``origin`` (D,) is zero, on the device."""

    kernel: Kernel
    parameters: Any
    mixture: Mixture
    frame: Frame
    precision: str
    origin: Tensor

    def empty_statistics(self) -> Statistics:
        """Statistics of no rows, for `e_step` to add to, on the device."""
        (one,) = self.several_empty(1)
        return one

    def several_empty(self, n: int) -> tuple[Statistics, ...]:
        """``n`` of them, as `Statistics.several`."""
        kind, n_components = self.mixture.covariance_type, self.mixture.n_components
        return Statistics.several(n, kind, n_components, self.origin, self.origin.device)

    def finish(self, statistics: Statistics) -> Statistics:
        """What `e_step` added up, in the frame's coordinates about its origin."""
        return self.kernel.finish(statistics, self.parameters)

    def log_likelihood(self, rows: Tensor) -> Tensor:
        """log p(x), (n,) fp64, nats."""
        return self.kernel.log_likelihood(rows, self.parameters)


def bind(
    mixture: Mixture, frame: Frame, precision: str, device: torch.device, workers: int, hard: bool = False
) -> BoundMixture:
    """``mixture`` ready for `e_step` at ``precision`` (medium, high or highest); ``hard`` assigns, as k-means does."""
    problem = Problem(mixture.n_components, mixture.n_features, mixture.covariance_type)
    kernel = select_kernel(problem, precision, device, workers, hard)
    origin = torch.zeros(mixture.n_features, dtype=torch.float64, device=device)
    return BoundMixture(kernel, kernel.parameters(mixture, frame, device), mixture, frame, precision, origin)


def e_step(rows: Tensor | KeptRows, bound: BoundMixture, statistics: Statistics, weights: Tensor | None = None) -> None:
    """Add the statistics of ``rows`` (n, D), which begin at a granule, to ``statistics`` in place.

    With ``weights`` (n,) each row counts as that many. Rows that are kept are of the mixture's `kept_form`.
    """
    e_step_of_runs(rows, bound, [Run(0, len(rows), statistics)], weights)


def e_step_of_runs(
    rows: Tensor | KeptRows, bound: BoundMixture, runs: Sequence[Run], weights: Tensor | None = None
) -> None:
    """As `e_step`, with statistics of its own for each run of the rows; together these are all rows, in order."""
    kernel, parameters = bound.kernel, bound.parameters
    if isinstance(kernel, RunKernel):
        kernel.accumulate_runs(rows, parameters, runs, weights)
        return
    assert isinstance(rows, Tensor)
    for run in runs:
        own = slice(run.start, run.stop)
        kernel.accumulate(rows[own], parameters, run.statistics, None if weights is None else weights[own])


def kept_form(bound: Sequence[BoundMixture], row_bytes: int) -> KeptForm | None:
    """The form in which rows that are stored in ``row_bytes`` each may stay on the device for all of ``bound``.

    None where they take it in different forms, or in that of the stored rows, or where that is no wider.
    """
    kernels = [(each.kernel, each.parameters) for each in bound]
    forms = [kernel.kept_form(own) if isinstance(kernel, RunKernel) else None for kernel, own in kernels]
    first = forms[0]
    if first is None or any(form is None or form.key != first.key for form in forms[1:]):
        return None
    return first if first.size(_MANY) < _MANY * row_bytes else None


_MANY = 1 << 16
