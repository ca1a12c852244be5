"""Lloyd's iteration: hard assignment, one update a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.mstep import EMPTY_COUNT
from streamgmm.statistics import Statistics
from streamgmm.steps.candidate import Candidate, mean_log_likelihood
from streamgmm.steps.collapse import Repair, keep


@dataclass(frozen=True)
class KMeansStep:
    """Means of the rows nearest to them (Lloyd 1982), as hard EM of a mixture with equal weights and one variance.

    The variance never changes, so the lower bound is the inertia but for a constant (`inertia`).

    Attributes
    ----------
    tol : float
        Converged when Σ‖Δμ‖² is at most this fraction of the data's mean variance a feature, as in scikit-learn.
    repair : Repair
        What happens to centres that own no row.
    """

    tol: float
    repair: Repair = keep

    def __call__(self, candidate: Candidate, statistics: Statistics) -> Candidate:
        lower_bound = mean_log_likelihood(statistics)
        host, before = statistics.to("cpu"), candidate.mixture
        counts, sums, scatter = host.counts.numpy(), host.sums.numpy(), host.scatter.numpy()
        if not all(np.isfinite(array).all() for array in (counts, sums, scatter)):
            raise NumericalError("a sufficient statistic overflowed; scale the data, or use precision='highest'")
        n, empty = counts.sum(), np.flatnonzero(counts < EMPTY_COUNT)
        means = host.shift.numpy() + sums / np.maximum(counts, EMPTY_COUNT)[:, None]
        means[empty] = before.means[empty]
        variance = (scatter.sum() / n - ((sums.sum(0) / n) ** 2).sum()) / means.shape[1]
        repaired = self.repair(Mixture(before.weights, means, before.covariances, before.covariance_type), empty)
        mixture = with_centres(repaired.means, float(before.covariances[0]))
        # A step with a repaired centre is not the last one, however small.
        same = len(empty) == 0 and mixture.n_components == before.n_components
        moved = float(((mixture.means - before.means) ** 2).sum()) if same else float("inf")
        stuck = mixture.digest == before.digest
        # Where moving empty centres gained nothing, moving them again will not.
        futile = len(empty) > 0 and len(candidate.empty) > 0 and lower_bound <= candidate.lower_bounds[-1]
        return replace(
            candidate,
            mixture=mixture,
            lower_bounds=(*candidate.lower_bounds, lower_bound),
            converged=stuck or futile or moved <= self.tol * max(float(variance), 0.0),
            empty=tuple(empty.tolist()),
            n_rows=float(statistics.n_rows),
        )


def with_centres(means: np.ndarray, variance: float) -> Mixture:
    """The mixture whose hard assignment is to the nearest of ``means`` (K, D)."""
    k = len(means)
    return Mixture(np.full(k, 1 / k), means, np.full(k, variance), "spherical")


def inertia(mixture: Mixture, lower_bound: float) -> float:
    """Mean squared distance to the nearest centre, from the mean hard log-likelihood of a `with_centres` mixture."""
    return float(squared_distances(mixture, np.float64(lower_bound)))


def squared_distances(mixture: Mixture, log_likelihood: Float64Array | np.float64) -> Float64Array:
    """Squared distance of rows to the nearest centre, (n,), from their hard log-likelihoods (n,) as for `inertia`."""
    k, d, variance = mixture.n_components, mixture.n_features, float(mixture.covariances[0])
    constant = -np.log(k) - d / 2 * np.log(2 * np.pi * variance)
    return np.asarray(np.maximum(2 * variance * (constant - log_likelihood), 0.0))
