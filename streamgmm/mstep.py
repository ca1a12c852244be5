"""Parameters from sufficient statistics, and what happens to a component that has none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

from streamgmm.errors import NumericalError
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.statistics import Statistics

EMPTY_COUNT = 1e-6
"""A component that owns fewer rows than this has no estimate of its own."""

RELATIVE_FLOOR = 1e-12
"""Smallest variance, relative to the data's: below it a component is degenerate."""


@dataclass(frozen=True)
class MStep:
    """New parameters, and which components the collapse policy ``floor`` had to repair.

    ``empty`` components keep their mean and covariance and get the weight of ``EMPTY_COUNT`` rows, from which they can
    recover; ``degenerate`` ones had their variances raised to ``RELATIVE_FLOOR`` of the data's.
    """

    mixture: Mixture
    empty: tuple[int, ...]
    degenerate: tuple[int, ...]


def m_step(statistics: Statistics, reg_covar: float, previous: Mixture) -> MStep:
    """Maximum-likelihood parameters of ``statistics`` (data's units), ``reg_covar`` added to every variance.

    The scatter is about the *new* means: Bishop (2006), eqs. 9.24–9.26. ``tied`` uses
    Σ_x (x−s)(x−s)ᵀ − Σ_k n_k δ_k δ_kᵀ with δ the new mean minus the shift.

    Raises
    ------
    NumericalError
        A statistic is not finite.
    """
    host = statistics.to("cpu")
    counts, sums, scatter = host.counts.numpy(), host.sums.numpy(), host.scatter.numpy()
    if not all(np.isfinite(array).all() for array in (counts, sums, scatter)):
        raise NumericalError("a sufficient statistic overflowed; scale the data, or use precision='highest'")
    shift = host.shift.numpy()
    empty = counts < EMPTY_COUNT
    safe = np.where(empty, 1.0, counts)
    offsets = sums / safe[:, None]
    means = np.where(empty[:, None], previous.means, shift + offsets)
    weights = np.where(empty, EMPTY_COUNT, counts)

    # One BLAS thread: a factorisation's bits must not depend on the machine's core count.
    with _blas().limit(limits=1, user_api="blas"):
        raw = _covariances(statistics.covariance_type, counts, safe, offsets, scatter)
        floor = _floor(statistics.covariance_type, counts, sums, scatter)
        covariances, degenerate = _repair(statistics.covariance_type, raw, reg_covar, floor)
    if statistics.covariance_type != "tied":
        keep = empty.reshape(-1, *([1] * (covariances.ndim - 1)))
        covariances = np.where(keep, previous.covariances, covariances)
        degenerate &= ~empty
    mixture = Mixture(weights / weights.sum(), means, covariances, statistics.covariance_type)
    return MStep(mixture, tuple(np.flatnonzero(empty).tolist()), tuple(np.flatnonzero(degenerate).tolist()))


def _covariances(
    kind: str, counts: Float64Array, safe: Float64Array, offsets: Float64Array, scatter: Float64Array
) -> Float64Array:
    """Covariances about the new means, before regularisation."""
    if kind == "diag":
        return np.asarray(scatter / safe[:, None] - offsets**2)
    if kind == "spherical":
        return np.asarray((scatter / safe - (offsets**2).sum(1)) / offsets.shape[1])
    if kind == "tied":
        return np.asarray((scatter - (offsets * counts[:, None]).T @ offsets) / counts.sum())
    d = offsets.shape[1]
    i, j = np.triu_indices(d)
    full = np.empty((len(safe), d, d))
    full[:, i, j] = scatter / safe[:, None] - offsets[:, i] * offsets[:, j]
    full[:, j, i] = full[:, i, j]
    return full


def _floor(kind: str, counts: Float64Array, sums: Float64Array, scatter: Float64Array) -> float:
    """The smallest variance allowed: relative to the mean variance of the data about its own mean."""
    n, d = counts.sum(), sums.shape[1]
    if kind == "full":
        scatter = scatter[:, np.cumsum([0, *range(d, 1, -1)])]
    elif kind == "tied":
        scatter = np.diagonal(scatter)
    variance = (scatter.sum() / n - ((sums.sum(0) / n) ** 2).sum()) / d
    return RELATIVE_FLOOR * (variance if variance > 0 else 1.0)


def _repair(kind: str, covariances: Float64Array, reg_covar: float, floor: float) -> tuple[Float64Array, np.ndarray]:
    """Regularised covariances with no variance below ``floor``, and a flag for each component that needed it."""
    if kind in ("diag", "spherical"):
        # Rounding can leave a tiny negative variance where all of a component's rows are equal.
        regularised = np.maximum(covariances, 0.0) + reg_covar
        low = regularised < floor
        return np.maximum(regularised, floor), np.asarray(low.any(axis=1) if low.ndim == 2 else low)
    regularised = covariances + reg_covar * np.eye(covariances.shape[-1])
    stack = regularised.reshape(-1, *regularised.shape[-2:])
    degenerate = np.array([not _is_positive_definite(matrix, floor) for matrix in stack])
    for k in np.flatnonzero(degenerate):
        values, vectors = np.linalg.eigh(stack[k])
        stack[k] = (vectors * np.maximum(values, max(floor, reg_covar))) @ vectors.T
        stack[k] = (stack[k] + stack[k].T) / 2
    return regularised, degenerate


def _is_positive_definite(matrix: Float64Array, floor: float) -> bool:
    try:
        lower = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return bool((np.diagonal(lower) ** 2 >= floor).all())


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
