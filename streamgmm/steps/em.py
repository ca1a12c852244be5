"""Full-batch EM: one update a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from streamgmm.mstep import m_step
from streamgmm.statistics import Statistics
from streamgmm.steps.candidate import Candidate, mean_log_likelihood
from streamgmm.steps.collapse import Repair, keep
from streamgmm.steps.split import split_heaviest


@dataclass(frozen=True)
class EMStep:
    """The exact EM update (Dempster, Laird & Rubin 1977).

    Attributes
    ----------
    tol : float
        Converged when the lower bound changes by less, nats a sample.
    reg_covar : float
        Added to every variance, in the data's squared units.
    repair : Repair
        What happens to components that own no row.
    split_to : int
        A converged mixture of fewer components has its heaviest ones split, at most doubling them, and goes on.
    """

    tol: float
    reg_covar: float
    repair: Repair = keep
    split_to: int = 0

    def __call__(self, candidate: Candidate, statistics: Statistics) -> Candidate:
        lower_bound = mean_log_likelihood(statistics)
        previous = candidate.lower_bounds[-1] if candidate.lower_bounds else -float("inf")
        update = m_step(statistics, self.reg_covar, candidate.mixture)
        mixture = self.repair(update.mixture, np.array(update.empty, dtype=np.int64))
        settled = abs(lower_bound - previous) < self.tol and mixture is update.mixture
        if settled and mixture.n_components < self.split_to:
            target = min(self.split_to, 2 * mixture.n_components)
            mixture, settled = split_heaviest(mixture, target - mixture.n_components), False
        return replace(
            candidate,
            mixture=mixture,
            lower_bounds=(*candidate.lower_bounds, lower_bound),
            converged=settled,
            empty=update.empty,
            degenerate=update.degenerate,
            n_rows=float(statistics.n_rows),
        )
