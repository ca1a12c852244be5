"""Full-batch EM: one update a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamgmm.mixture import Mixture
from streamgmm.mstep import m_step
from streamgmm.statistics import Statistics


@dataclass(frozen=True)
class StepSettings:
    """What an update depends on.

    Attributes
    ----------
    tol : float
        Converged when the lower bound changes by less, nats a sample.
    reg_covar : float
        Added to every variance, in the data's squared units.
    """

    tol: float
    reg_covar: float


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mixture being trained. The lower bounds are of the parameters *before* each update, as in scikit-learn."""

    mixture: Mixture
    precision: str
    lower_bounds: tuple[float, ...] = ()
    converged: bool = False
    empty: tuple[int, ...] = ()
    degenerate: tuple[int, ...] = ()

    @property
    def n_iter(self) -> int:
        return len(self.lower_bounds)


def em_step(candidate: Candidate, statistics: Statistics, settings: StepSettings) -> Candidate:
    """One exact EM update from the statistics of every row (Dempster, Laird & Rubin 1977)."""
    lower_bound = float(statistics.log_likelihood / statistics.n_rows)
    previous = candidate.lower_bounds[-1] if candidate.lower_bounds else -float("inf")
    update = m_step(statistics, settings.reg_covar, candidate.mixture)
    return replace(
        candidate,
        mixture=update.mixture,
        lower_bounds=(*candidate.lower_bounds, lower_bound),
        converged=abs(lower_bound - previous) < settings.tol,
        empty=update.empty,
        degenerate=update.degenerate,
    )
