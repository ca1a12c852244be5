"""The numbers behind the pictures of a mixture: spectra of its covariances, and the plane its means are seen in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamgmm.mixture import Float64Array, Mixture

_EIGEN_BUDGET = 2e10
"""Bound on M·D³ for M decomposed covariances: some ten seconds."""

_POWER_STEPS = 20


@dataclass(frozen=True, eq=False)
class Spectra:
    """Eigenvalues of covariances, in the data's squared units.

    Attributes
    ----------
    components : (M,) int array
        Whose they are, heaviest first; all of them unless D is so large that only the heaviest were decomposed.
    eigenvalues : (M, D) fp64 array, ascending
        One row for a tied covariance, (K, 1) for spherical ones.
    """

    components: np.ndarray
    eigenvalues: Float64Array

    @property
    def condition_numbers(self) -> Float64Array:
        """Largest over smallest eigenvalue, (M,); infinite where the smallest is not positive."""
        smallest, largest = self.eigenvalues[:, 0], self.eigenvalues[:, -1]
        whole = smallest > 0
        return np.where(whole, largest / np.where(whole, smallest, 1), np.inf)


def spectra(mixture: Mixture) -> Spectra:
    """Eigenvalues of the mixture's covariances; of the heaviest alone where all would take minutes."""
    heaviest = np.argsort(-mixture.weights, kind="stable")
    if mixture.covariance_type == "spherical":
        return Spectra(heaviest, mixture.covariances[heaviest, None])
    if mixture.covariance_type == "diag":
        return Spectra(heaviest, np.sort(mixture.covariances[heaviest], axis=1))
    if mixture.covariance_type == "tied":
        heaviest, dense = heaviest[:1], mixture.covariances[None]
    else:
        heaviest = heaviest[: max(1, int(_EIGEN_BUDGET / mixture.n_features**3))]
        dense = mixture.covariances[heaviest]
    return Spectra(heaviest, np.asarray(np.linalg.eigvalsh(dense), dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Plane:
    """A mixture seen along two orthonormal directions of its space.

    Attributes
    ----------
    means : (K, 2) fp64 array
        About the mixture's mean.
    covariances : (K, 2, 2) fp64 array
    share : (2,) fp64 array
        Each direction's share of the weighted scatter of the means; NaN where the means do not differ.
    """

    means: Float64Array
    covariances: Float64Array
    share: Float64Array


def principal_plane(mixture: Mixture) -> Plane:
    """The plane that holds most of the weighted scatter of the means (weighted PCA); D must be at least 2.

    Where the means span less than a plane (K ≤ 2, say), the direction in which the components are widest completes it.
    """
    from sklearn.utils.extmath import randomized_svd  # scikit-learn takes a second to import

    weights = mixture.weights / mixture.weights.sum()
    centred = mixture.means - weights @ mixture.means
    scatter = np.sqrt(weights)[:, None] * centred
    _, singular, right = randomized_svd(scatter, min(2, mixture.n_components), n_iter=7, random_state=0)
    # Below rounding a direction is noise: it says nothing about the means.
    told = singular > 1e-12 * np.abs(mixture.means).max() * np.sqrt(mixture.n_features)
    share = np.full(2, np.nan)
    share[: told.sum()] = singular[told] ** 2 / (scatter**2).sum()
    axes = right[told]
    while len(axes) < 2:
        axes = np.vstack([axes, _widest_direction(_pooled(mixture, weights), axes)])
    return Plane(centred @ axes.T, _seen_along(mixture, axes), share)


def _pooled(mixture: Mixture, weights: Float64Array) -> Float64Array:
    """The weighted mean covariance, (D, D), or its diagonal, (D,)."""
    if mixture.covariance_type == "spherical":
        return np.full(mixture.n_features, weights @ mixture.covariances)
    if mixture.covariance_type == "tied":
        return mixture.covariances
    return np.asarray(np.tensordot(weights, mixture.covariances, 1))


def _widest_direction(pooled: Float64Array, taken: Float64Array) -> Float64Array:
    """A unit vector of large variance under ``pooled``, orthogonal to the rows of ``taken``, (D,): power iteration."""
    diagonal = pooled if pooled.ndim == 1 else np.diagonal(pooled)
    free = 1 - (taken**2).sum(0)
    direction = np.zeros(len(diagonal))
    direction[np.argmax(free * (diagonal / max(diagonal.max(), 1e-300) + 1e-9))] = 1
    direction -= taken.T @ (taken @ direction)
    direction /= np.linalg.norm(direction)
    for _ in range(_POWER_STEPS):
        further = pooled * direction if pooled.ndim == 1 else pooled @ direction
        further -= taken.T @ (taken @ further)
        length = np.linalg.norm(further)
        if not length > 0:
            break
        direction = further / length
    return direction


def _seen_along(mixture: Mixture, axes: Float64Array) -> Float64Array:
    """A Σ_k Aᵀ for two directions A (2, D): (K, 2, 2)."""
    own = mixture.covariances
    if mixture.covariance_type == "full":
        return np.asarray(axes @ (own @ axes.T))
    if mixture.covariance_type == "tied":
        return np.broadcast_to(axes @ own @ axes.T, (mixture.n_components, 2, 2))
    if mixture.covariance_type == "diag":
        # (K, D) by (D, 4): products of the directions' coordinates.
        return np.asarray((own @ (axes[:, None] * axes[None]).reshape(4, -1).T).reshape(-1, 2, 2))
    return np.asarray(own[:, None, None] * (axes @ axes.T))
