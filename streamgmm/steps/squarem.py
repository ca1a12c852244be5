"""SQUAREM: every two EM updates, a step further in the direction in which they went.

From x₀, x₁ = EM(x₀) and x₂ = EM(x₁), with r = x₁ − x₀ and v = (x₂ − x₁) − r, the next parameters are

    x₀ − 2αr + α²v,        α = −min(4, max(1, ‖r‖ / ‖v‖))

(Varadhan & Roland 2008, "Simple and globally convergent methods for accelerating the convergence of any EM algorithm",
eq. 8, scheme S3). Deviations: 1. They are judged by the likelihood that the next EM pass finds anyway, so that nothing
is read for it; where it is lower than that of x₁ the pass is lost and training goes on from x₂. 2. No coordinate moves
from x₂ by more than one: a weight or a deviation by the factor e, a mean by one deviation. 3. Norms weigh a
component's coordinates by its weight, as the Fisher information does. 4. α has a bound: on a plateau ‖r‖ / ‖v‖ says
nothing, and every extrapolation was undone there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from streamgmm.mixture import Float64Array, Mixture
from streamgmm.statistics import Statistics
from streamgmm.steps.candidate import Candidate, Step, mean_log_likelihood
from streamgmm.steps.split import deviations

MIXTURES_BEHIND = 8
"""Held at most besides the candidate's: a trail of two or a fallback, and coordinates of three with their moves."""

_LARGEST_MOVE = 1.0
_LARGEST_STEP = 4.0


@dataclass(frozen=True)
class Squarem:
    """``step`` (EM), and after every second one an extrapolation, which is undone where it did harm."""

    step: Step

    def __call__(self, candidate: Candidate, statistics: Statistics) -> Candidate:
        bounds = candidate.lower_bounds
        if candidate.fallback is not None and mean_log_likelihood(statistics) < bounds[-1]:
            # What is known of the fallback is that it is no worse than what it was made from.
            undone = replace(candidate, mixture=candidate.fallback, trail=(), fallback=None)
            return replace(undone, lower_bounds=(*bounds, bounds[-1]))
        updated = self.step(candidate, statistics)
        trail = (*candidate.trail, candidate.mixture)
        new = updated.mixture
        # What a repair, a split or a floor did is no direction to go on in.
        regular = not (updated.empty or updated.degenerate) and new.n_components == candidate.mixture.n_components
        if updated.converged or not regular:
            return replace(updated, trail=(), fallback=None)
        if len(trail) < 2:
            return replace(updated, trail=trail, fallback=None)
        further = extrapolated(trail[0], trail[1], new)
        return replace(updated, mixture=further or new, trail=(), fallback=None if further is None else new)


def extrapolated(first: Mixture, second: Mixture, third: Mixture) -> Mixture | None:
    """Parameters beyond three successive EM iterates of one shape; None where there are none that are finite.

    Coordinates are log-weights, means over the third one's deviations σ, and lower Cholesky factors of covariances
    with rows over σ and logarithms on the diagonal (of ``diag`` and ``spherical`` log-deviations): any numbers are
    coordinates of a mixture.
    """
    scale = deviations(third)
    x0, x1, x2 = (_coordinates(mixture, scale) for mixture in (first, second, third))
    if not all(np.isfinite(each).all() for each in (*x0, *x1, *x2)):
        return None
    r = [b - a for a, b in zip(x0, x1, strict=True)]
    v = [c - b - d for b, c, d in zip(x1, x2, r, strict=True)]
    bend = _norm(v, third.weights)
    alpha = -min(_LARGEST_STEP, max(1.0, _norm(r, third.weights) / bend)) if bend > 0 else -1.0
    moves = [a - 2 * alpha * d + alpha**2 * e - c for a, c, d, e in zip(x0, x2, r, v, strict=True)]
    return _mixture([c + np.clip(m, -_LARGEST_MOVE, _LARGEST_MOVE) for c, m in zip(x2, moves, strict=True)], third)


def _norm(coordinates: list[Float64Array], weights: Float64Array) -> float:
    """Root of the sum of squares, each times its component's weight; what components share counts once."""
    squares = [(each**2).reshape(len(each), -1).sum(1) for each in coordinates]
    return float(np.sqrt(sum(square @ weights if len(square) == len(weights) else square.sum() for square in squares)))


def _coordinates(mixture: Mixture, scale: Float64Array) -> list[Float64Array]:
    """Log-weights (K,), means (K, D), factors of covariances (K, …); of ``tied`` (1, D, D)."""
    with np.errstate(divide="ignore"):  # a component without weight has no finite coordinates
        return [np.log(mixture.weights), mixture.means / scale, _factors(mixture, scale)]


def _factors(mixture: Mixture, scale: Float64Array) -> Float64Array:
    if mixture.covariance_type in ("diag", "spherical"):
        return np.asarray(np.log(mixture.covariances) / 2)
    d = mixture.n_features
    lower = np.linalg.cholesky(mixture.covariances.reshape(-1, d, d)) / scale[: _matrices(mixture), :, None]
    on = np.arange(d)
    lower[:, on, on] = np.log(lower[:, on, on])
    return np.asarray(lower)


def _matrices(mixture: Mixture) -> int:
    return 1 if mixture.covariance_type == "tied" else mixture.n_components


def _mixture(coordinates: list[Float64Array], like: Mixture) -> Mixture:
    """The inverse of `_coordinates` with the scale of ``like``."""
    weights, means, factors = coordinates
    scale = deviations(like)
    weights = np.exp(weights - weights.max())
    if like.covariance_type in ("diag", "spherical"):
        covariances = np.exp(2 * factors)
    else:
        on = np.arange(like.n_features)
        lower = factors.copy()
        lower[:, on, on] = np.exp(lower[:, on, on])
        lower *= scale[: _matrices(like), :, None]
        covariances = (lower @ lower.transpose(0, 2, 1)).reshape(like.covariances.shape)
    return Mixture(weights / weights.sum(), means * scale, covariances, like.covariance_type)
