"""One model being trained, and what an update of it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from streamgmm.errors import NumericalError
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

NO_WEIGHT = "no row counts: every sample weight is zero, or every row was skipped; check the data"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mixture being trained. The lower bounds are of the parameters *before* each update, as in scikit-learn.

    Attributes
    ----------
    mixture : Mixture
    precision : str
        In which its next pass begins.
    lower_bounds : tuple of float
        Nats a sample.
    converged : bool
    empty, degenerate : tuple of int
        Components that the last update found without rows, or without volume.
    n_rows : float
        Weight of the rows in the last update.
    trail : tuple of Mixture
        Those before ``mixture`` that an accelerated step still looks back at; of the same shape.
    fallback : Mixture or None
        Takes the place of ``mixture`` where that, an extrapolation, turns out to be worse.
    """

    mixture: Mixture
    precision: str
    lower_bounds: tuple[float, ...] = ()
    converged: bool = False
    empty: tuple[int, ...] = ()
    degenerate: tuple[int, ...] = ()
    n_rows: float = 0.0
    trail: tuple[Mixture, ...] = ()
    fallback: Mixture | None = None

    @property
    def result(self) -> Mixture:
        """What would be kept if training ended here: no extrapolation that has not been judged."""
        return self.mixture if self.fallback is None else self.fallback

    @property
    def n_iter(self) -> int:
        return len(self.lower_bounds)


class Step(Protocol):
    """One parameter update from the statistics of every row, in the data's units."""

    def __call__(self, candidate: Candidate, statistics: Statistics) -> Candidate:
        """The updated candidate.

        Raises
        ------
        NumericalError
            No finite parameters follow from the statistics.
        """
        ...


def mean_log_likelihood(statistics: Statistics) -> float:
    """Nats a sample.

    Raises
    ------
    NumericalError
        The rows have no weight at all.
    """
    n_rows = float(statistics.n_rows)
    if not n_rows > 0:
        raise NumericalError(NO_WEIGHT)
    return float(statistics.log_likelihood) / n_rows
