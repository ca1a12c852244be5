"""Splitting the components that gain most by it: where two fit their rows better than one does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamgmm.io.bfloat16 import values
from streamgmm.io.sources.base import Rows
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.parallel import map_in_order

_ITERATIONS = 8
_POWER_ITERATIONS = 4
_OFFSET = 0.7
_SMALLEST_HALF = 5
_PRIOR_ROWS = 4
_VALUES = 1 << 16
_FEWEST_ROWS = 128
"""Numbers of one component's rows that are looked at, but so many rows at least; more of them say the same."""

_COPIES = 10


@dataclass(frozen=True, eq=False)
class Halves:
    """Two components in place of one.

    Attributes
    ----------
    gain : float
        Log-likelihood of its rows gained, nats; −inf where a half would own fewer than five.
    shares : (2,) array
        Of its weight.
    means : (2, D) array
    covariances : array
        (2, …) as in `Mixture`; empty for ``tied``, which keeps its own.
    """

    gain: float
    shares: Float64Array
    means: Float64Array
    covariances: Float64Array


def split_best(
    mixture: Mixture, rows: Rows, weights: Float64Array, labels: np.ndarray, count: int, seed: list[int], workers: int
) -> Mixture:
    """``mixture`` with the ``count`` ≤ K components that gain most split in two; the second halves come last.

    Parameters
    ----------
    rows : (n, D) array
        On the host.
    weights : (n,) array
        What each counts.
    labels : (n,) array
        The most likely component of each.
    """
    k = mixture.n_components
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(k + 1))
    axes = np.random.default_rng(seed).normal(size=(k, mixture.n_features))

    def halved(component: int) -> Halves:
        own = order[edges[component] : edges[component + 1]]
        looked_at = own[:: max(1, -(-len(own) // _most_rows(mixture.n_features)))]
        x, w = values(rows)[looked_at].astype(np.float64), weights[looked_at]
        return split(mixture, component, x, w * (len(own) / max(1, len(looked_at))), axes[component])

    halves = list(map_in_order(halved, range(k), workers))
    gains = np.array([half.gain for half in halves])
    chosen = np.lexsort((-mixture.weights, -gains))[:count]
    new_weights, means, covariances = mixture.weights.copy(), mixture.means.copy(), mixture.covariances.copy()
    first, second = ([(halves[c], i) for c in chosen] for i in (0, 1))
    new_weights[chosen] *= [half.shares[i] for half, i in first]
    means[chosen] = [half.means[i] for half, i in first]
    if mixture.covariance_type != "tied":
        covariances[chosen] = [half.covariances[i] for half, i in first]
        covariances = np.concatenate([covariances, [half.covariances[i] for half, i in second]])
    new_weights = np.concatenate([new_weights, mixture.weights[chosen] * [half.shares[i] for half, i in second]])
    means = np.concatenate([means, [half.means[i] for half, i in second]])
    return Mixture(new_weights / new_weights.sum(), means, covariances, mixture.covariance_type)


def split_bytes(n_rows: int, n_features: int, workers: int) -> int:
    """Memory that `split_best` takes: labels and order of the rows, and what each worker looks at, in fp64."""
    numbers = n_features * max(_most_rows(n_features), n_features)
    return 32 * n_rows + (workers + 1) * _COPIES * 8 * numbers


def _most_rows(n_features: int) -> int:
    return max(_VALUES // n_features, _FEWEST_ROWS)


def split(mixture: Mixture, component: int, x: Float64Array, weights: Float64Array, axis: Float64Array) -> Halves:
    """The halves of ``component`` after a few EM iterations of two components on its rows ``x`` (n, D) alone.

    They start on either side of its mean, along its rows' leading axis (of ``full``, its own), which power iteration
    finds from ``axis`` (D,). Everything is in the coordinates in which the component is a unit Gaussian; there its
    covariance, as if of four more rows (D for ``full``), keeps a handful of rows from looking like a gain.
    """
    kind, d = mixture.covariance_type, mixture.n_features
    whitening = _whitening(mixture, component)
    mean = torch.from_numpy(np.array(mixture.means[component]))
    y = torch.from_numpy(x) - mean
    y = y @ whitening if whitening.ndim == 2 else y * whitening
    w = torch.from_numpy(weights)
    direction = _leading(y * w[:, None].sqrt(), torch.from_numpy(axis), own=whitening if kind == "full" else None)
    shares = torch.full((2,), 0.5, dtype=torch.float64)
    means = torch.stack([-_OFFSET * direction, _OFFSET * direction])
    unit = torch.eye(d, dtype=torch.float64) if kind == "full" else torch.ones(d, dtype=torch.float64)
    spreads = torch.stack([unit, unit])
    start, gain = (shares, means, spreads), -np.inf
    if len(y):
        for _ in range(_ITERATIONS):
            joint = shares.log() + torch.stack([_log_density(y, means[i], spreads[i]) for i in (0, 1)], 1)
            both = joint.logsumexp(1)
            resp = (joint - both[:, None]).exp() * w[:, None]
            counts = resp.sum(0).clamp(min=1e-6)
            means = (resp.T @ y) / counts[:, None]
            spreads = torch.stack([_spread(kind, y - means[i], resp[:, i], counts[i], unit) for i in (0, 1)])
            shares = (counts / w.sum().clamp(min=1e-6)).clamp(1e-3, 1 - 1e-3)
            shares = shares / shares.sum()
        if float(shares.min() * w.sum()) >= _SMALLEST_HALF:
            gain = float((w * (both - _log_density(y, torch.zeros_like(mean), unit))).sum())
        if not np.isfinite(gain):
            gain, (shares, means, spreads) = -np.inf, start
    back = torch.linalg.inv(whitening) if whitening.ndim == 2 else 1 / whitening
    moved = mean + (means @ back if back.ndim == 2 else means * back)
    return Halves(gain, shares.numpy(), moved.numpy(), _covariances(kind, spreads, back).numpy())


def _whitening(mixture: Mixture, component: int) -> Tensor:
    """U with U Uᵀ = Σ⁻¹, (D, D), or 1/σ, (D,)."""
    chol = mixture.precisions_cholesky
    if mixture.covariance_type == "spherical":
        return torch.full((mixture.n_features,), float(chol[component]), dtype=torch.float64)
    return torch.from_numpy(np.array(chol if mixture.covariance_type == "tied" else chol[component]))


def _leading(y: Tensor, axis: Tensor, own: Tensor | None) -> Tensor:
    """The unit vector along which ``y`` (n, D) varies most; along which Σ does, given its whitening matrix."""
    # Whitened by their own covariance, rows vary alike along every axis: what was longest before is as good a guess.
    moments = y.T @ y if own is None else torch.linalg.inv(own @ own.T)
    for _ in range(_POWER_ITERATIONS):
        axis = moments @ axis + 1e-12
        axis = axis / axis.norm()
    axis = axis if own is None else axis @ own
    return axis.div(axis.norm())


def _log_density(y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """log N(y; mean, spread) + D/2 log 2π, (n,); ``spread`` is a variance a feature, or a matrix."""
    centred = y - mean
    if spread.ndim == 1:
        return (centred**2 / spread).sum(1).add(spread.log().sum()).mul(-0.5)
    lower = torch.linalg.cholesky(spread)
    whitened = torch.linalg.solve_triangular(lower, centred.T, upper=False)
    energy: Tensor = (whitened**2).sum(0)
    return energy.mul(-0.5).sub(lower.diagonal().log().sum())


def _spread(kind: str, centred: Tensor, resp: Tensor, count: Tensor, unit: Tensor) -> Tensor:
    """A half's covariance with the prior's rows, of which each has the covariance ``unit``."""
    if kind == "tied":
        return unit
    if kind == "full":
        prior = max(_PRIOR_ROWS, len(unit))
        return ((centred * resp[:, None]).T @ centred + prior * unit) / (count + prior)
    scatter = resp @ centred**2
    if kind == "spherical":
        scatter = scatter.mean().expand_as(unit)
    return (scatter + _PRIOR_ROWS * unit) / (count + _PRIOR_ROWS)


def _covariances(kind: str, spreads: Tensor, back: Tensor) -> Tensor:
    """In the data's units, shaped as `Mixture` has them."""
    if kind == "tied":
        return spreads.new_empty(0)
    if kind == "full":
        covariances = back.T @ spreads @ back
        return (covariances + covariances.mT) / 2
    variances = spreads * back**2
    return variances[:, 0] if kind == "spherical" else variances
