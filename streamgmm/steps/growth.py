"""A mixture grown on a sample in memory: a better optimum than k-means leads to, and no row read.

A sixteenth of the components are seeded; then half of them are split, where two fit better than one, and trained for a
few iterations, until there are K. It was the one thing that mattered of all that was tried (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamgmm.errors import NumericalError
from streamgmm.estep import BoundMixture, bind, e_step
from streamgmm.frame import Frame
from streamgmm.io.sources.base import Rows
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.mstep import m_step
from streamgmm.precision import choose_precision, first_precision, next_precision
from streamgmm.statistics import Statistics
from streamgmm.steps.gain import split_best

_FIRST_FRACTION = 16
_FEWEST = 8
_ITERATIONS_A_ROUND = 5
_LAST_ITERATIONS = 25


@dataclass(frozen=True, eq=False)
class SampleEM:
    """EM over rows in memory.

    Attributes
    ----------
    rows : (n, D) tensor
        Of the stored type, on the device.
    weights : (n,) fp64 tensor or None
        What each counts, on the device.
    check_rows : (m, D) tensor
        On which ``auto`` checks precisions.
    frame : Frame
    precision : str
    reg_covar : float
    chunk_rows : int
        Rows in one call of a kernel; they change no bit.
    workers : int
    """

    rows: Tensor
    weights: Tensor | None
    check_rows: Tensor
    frame: Frame
    precision: str
    reg_covar: float
    chunk_rows: int
    workers: int

    def iterate(self, mixture: Mixture, iterations: int) -> Mixture:
        """So many EM iterations, in a precision that is checked at the first.

        Raises
        ------
        NumericalError
            The likelihood is not a finite number.
        """
        precision = self._checked(mixture)
        for _ in range(iterations):
            statistics = self._statistics(mixture, precision)
            while not bool(torch.isfinite(statistics.log_likelihood)):
                precision = self._wider(precision)
                statistics = self._statistics(mixture, precision)
            mixture = m_step(statistics, self.reg_covar, mixture).mixture
        return mixture

    def labels(self, mixture: Mixture) -> np.ndarray:
        """The most likely component of each row, (n,)."""
        bound = self._bound(mixture, self._checked(mixture))
        found = [bound.kernel.top(rows, bound.parameters, 1).labels[:, 0] for rows, _ in self._chunks()]
        return torch.cat(found).cpu().numpy()

    def _statistics(self, mixture: Mixture, precision: str) -> Statistics:
        """In the data's units."""
        bound = self._bound(mixture, precision)
        sums = bound.empty_statistics()
        for rows, weights in self._chunks():
            e_step(rows, bound, sums, weights)
        return self.frame.restore(bound.finish(sums))

    def _wider(self, precision: str) -> str:
        wider = next_precision(precision) if self.precision == "auto" else None
        if wider is None:
            raise NumericalError(
                f"the likelihood of the sample is not finite in precision {precision!r}; "
                "use precision='auto', or scale the data"
            )
        return wider

    def _checked(self, mixture: Mixture) -> str:
        if self.precision != "auto":
            return self.precision
        return choose_precision(mixture, self.frame, first_precision("auto"), self.check_rows, self.workers)

    def _bound(self, mixture: Mixture, precision: str) -> BoundMixture:
        return bind(mixture, self.frame, precision, self.rows.device, self.workers)

    def _chunks(self) -> list[tuple[Tensor, Tensor | None]]:
        rows = self.rows.split(self.chunk_rows)
        weights = [None] * len(rows) if self.weights is None else self.weights.split(self.chunk_rows)
        return list(zip(rows, weights, strict=True))


def first_size(n_components: int) -> int:
    """Components that growth begins with."""
    return min(n_components, max(_FEWEST, n_components // _FIRST_FRACTION))


def grown(
    first: Mixture,
    n_components: int,
    em: SampleEM,
    rows: Rows,
    weights: Float64Array,
    seed: list[int],
) -> Mixture:
    """``first`` grown to ``n_components``; ``rows`` and ``weights`` are those of ``em``, on the host.

    Thirty iterations end it where the sample has a row a parameter, five where it has fewer and more would overfit.
    """
    mixture = em.iterate(first, _ITERATIONS_A_ROUND)
    while (k := mixture.n_components) < n_components:
        count = min(max(1, k // 2), n_components - k)
        mixture = split_best(mixture, rows, weights, em.labels(mixture), count, [*seed, k], em.workers)
        mixture = em.iterate(mixture, _ITERATIONS_A_ROUND)
    enough = len(rows) >= mixture.n_parameters
    return em.iterate(mixture, _LAST_ITERATIONS) if enough else mixture
