"""Splitting components in two, as speech toolkits grow a mixture (HTK Book, §10.6)."""

from __future__ import annotations

import numpy as np

from streamgmm.mixture import Float64Array, Mixture

DEVIATIONS = 0.2
"""The halves' means move apart by this many standard deviations, each way."""


def split_heaviest(mixture: Mixture, count: int) -> Mixture:
    """``mixture`` with its ``count`` ≤ K heaviest components halved; the second halves come last."""
    heaviest = np.argsort(-mixture.weights, kind="stable")[:count]
    first, offsets = _halved(mixture, heaviest)
    covariances = first.covariances
    if mixture.covariance_type != "tied":
        covariances = np.concatenate([covariances, covariances[heaviest]])
    return Mixture(
        np.concatenate([first.weights, first.weights[heaviest]]),
        np.concatenate([first.means, mixture.means[heaviest] + offsets]),
        covariances,
        mixture.covariance_type,
    )


def split_into(mixture: Mixture, places: np.ndarray) -> Mixture:
    """``mixture`` with the components at ``places`` replaced by second halves of the heaviest others."""
    weights = mixture.weights.copy()
    weights[places] = -1.0
    heaviest = np.resize(np.argsort(-weights, kind="stable")[: len(weights) - len(places)], len(places))
    # More empty components than others: the same one is halved again and again.
    for place, source in zip(places, heaviest, strict=True):
        halved, offsets = _halved(mixture, np.array([source]))
        weights, means = halved.weights.copy(), halved.means.copy()
        weights[place] = weights[source]
        means[place] = mixture.means[source] + offsets[0]
        covariances = mixture.covariances
        if mixture.covariance_type != "tied":
            covariances = covariances.copy()
            covariances[place] = covariances[source]
        mixture = Mixture(weights / weights.sum(), means, covariances, mixture.covariance_type)
    return mixture


def _halved(mixture: Mixture, chosen: np.ndarray) -> tuple[Mixture, Float64Array]:
    """The mixture with ``chosen`` halved and moved back by offsets (n, D), and those offsets."""
    offsets = DEVIATIONS * deviations(mixture)[chosen]
    weights, means = mixture.weights.copy(), mixture.means.copy()
    weights[chosen] /= 2
    means[chosen] -= offsets
    return Mixture(weights, means, mixture.covariances, mixture.covariance_type), offsets


def deviations(mixture: Mixture) -> Float64Array:
    """Standard deviation of each component along each feature, (K, D)."""
    variances = mixture.covariances
    if mixture.covariance_type in ("full", "tied"):
        variances = np.diagonal(variances, axis1=-2, axis2=-1)
    elif mixture.covariance_type == "spherical":
        variances = variances[:, None]
    return np.asarray(np.sqrt(np.broadcast_to(variances, mixture.means.shape)))
