"""Tiled matrix products on any device: fast on a CPU, and the path of every covariance type.

A tile is a granule of rows. Its log joint densities (K, rows) are formed by one product, turned into responsibilities
with one exponential an element, multiplied with the features again, and forgotten: memory is bounded by the
tile. On a CPU tiles are spread over worker threads, each with single-threaded BLAS, and their sums are added in row
order, so the number of workers never changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from math import inf
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem, TopComponents
from streamgmm.kernels.natural import natural_parameters
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.parallel import map_in_order, one_thread, scratch
from streamgmm.statistics import Statistics, scatter_shape

TILE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""Of a tile's features and densities, were they fp32. What a CPU's caches hold leaves a GPU idle."""

_TILE_ROWS = (256, 4096)

_RANKING_BYTES = 24
"""Of a row and component while a tile's components are sorted: order, sorted densities, and the sort's own copy."""

_MOST_SEARCHES = 32
"""Ranks up to this are found one after the other: sorting 64 densities takes as long as sixty searches."""

Item = TypeVar("Item")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TiledParameters:
    """α (K, 1) and θ (K, F) of `natural.natural_parameters` in the working type, on the device.

    ``shift`` and ``scale`` (D, 1) of the frame are fp64, and exact in float32 for rows that are not float64.
    """

    covariance_type: str
    shift: Tensor
    scale: Tensor
    constants: Tensor
    coefficients: Tensor
    common: Tensor | None


@dataclass(frozen=True)
class TileSums:
    """One tile's sums, in the working type: fp32 lives no longer than this.

    Attributes
    ----------
    counts : (K,) tensor
    feature_sums : (K, F) tensor
        Σ r φ(x).
    second_moment : (D, D) tensor or None
        Σ xxᵀ of ``tied``, whose features are x alone.
    """

    counts: Tensor
    feature_sums: Tensor
    second_moment: Tensor | None

    def add_to(self, statistics: Statistics) -> None:
        """Add counts, sums and scatter to fp64 ``statistics`` in place."""
        d = statistics.n_features
        statistics.counts.add_(self.counts)
        statistics.sums.add_(self.feature_sums[:, :d])
        scatter = self.feature_sums[:, d:] if self.second_moment is None else self.second_moment
        statistics.scatter.add_(scatter.reshape(statistics.scatter.shape))


@dataclass(frozen=True)
class TiledKernel:
    """`Kernel` by tiled products in ``dtype`` (float32 or float64)."""

    dtype: torch.dtype
    workers: int = 1
    hard: bool = False
    tile_bytes: int = TILE_BYTES["cpu"]

    def granule(self, problem: Problem) -> int:
        width = n_row_features(problem) + 2 * problem.n_components
        rows = self.tile_bytes // (4 * width)
        return min(max(1 << max(rows, 1).bit_length() - 1, _TILE_ROWS[0]), _TILE_ROWS[1])

    def scratch_bytes(self, problem: Problem, rows: int, workers: int, top: int = 0) -> int:
        # Each worker: centred rows, features, joint densities and responsibilities; and the sums that wait in order.
        k, d, f = problem.n_components, problem.n_features, n_row_features(problem)
        tile_rows = min(rows, self.granule(problem))
        tile = tile_rows * (2 * d + f + 2 * k + 8)
        ranking = workers * tile_rows * k * _RANKING_BYTES if top > 1 else 0
        return self.dtype.itemsize * (workers * tile + (workers + 2) * (k * (f + 1) + d * d)) + ranking

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> TiledParameters:
        numpy_dtype = np.float32 if self.dtype == torch.float32 else np.float64

        def rounded(values: Float64Array) -> Float64Array:
            return values.astype(numpy_dtype).astype(np.float64)

        natural = natural_parameters(mixture, frame, rounded)
        parts = [natural.linear] if natural.common is not None else [natural.linear, natural.quadratic]

        def on_device(values: Float64Array) -> Tensor:
            return torch.tensor(values, dtype=self.dtype, device=device)

        return TiledParameters(
            mixture.covariance_type,
            torch.as_tensor(frame.shift, device=device)[:, None],
            torch.as_tensor(frame.scale, device=device)[:, None],
            on_device(natural.constants)[:, None],
            on_device(np.concatenate(parts, axis=1)),
            None if natural.common is None else on_device(natural.common),
        )

    def accumulate(
        self, rows: Tensor, parameters: TiledParameters, statistics: Statistics, weights: Tensor | None = None
    ) -> None:
        granule = self._granule(rows, parameters)
        own_weights = repeat(None) if weights is None else weights.split(granule)
        tiles = zip(rows.split(granule), own_weights, strict=False)
        with one_thread():
            for sums, log_likelihood, n_rows in self._map(lambda tile: self._sums(*tile, parameters), tiles, rows):
                sums.add_to(statistics)
                statistics.log_likelihood.add_(log_likelihood)
                statistics.n_rows.add_(n_rows)

    def finish(self, statistics: Statistics, parameters: TiledParameters) -> Statistics:
        return statistics

    def log_likelihood(self, rows: Tensor, parameters: TiledParameters) -> Tensor:
        tiles = rows.split(self._granule(rows, parameters))
        return torch.cat(list(self._map(lambda tile: self._log_likelihood(tile, parameters), tiles, rows)))

    def top(self, rows: Tensor, parameters: TiledParameters, m: int) -> TopComponents:
        tiles = rows.split(self._granule(rows, parameters))
        ranked = self._map(lambda tile: self._top(tile, parameters, m), tiles, rows)
        return TopComponents(*(torch.cat(pieces) for pieces in zip(*ranked, strict=True)))

    def map_joint(self, function: Callable[[Tensor], T], rows: Tensor, parameters: TiledParameters) -> Iterator[T]:
        """``function`` of log w_k p_k(x), (K, rows of a tile), for each tile in row order; nats in the data's units.

        The tile's memory is used again: ``function`` must not return a view of it.
        """
        tiles = rows.split(self._granule(rows, parameters))
        return self._map(lambda tile: function(_log_joint(tile, parameters)), tiles, rows)

    def _granule(self, rows: Tensor, parameters: TiledParameters) -> int:
        k, f = parameters.coefficients.shape
        problem = Problem(k, rows.shape[1], parameters.covariance_type)
        assert f == n_row_features(problem)
        return self.granule(problem)

    def _map(self, function: Callable[[Item], T], tiles: Iterable[Item], rows: Tensor) -> Iterator[T]:
        """``function`` of each tile of ``rows``, in order."""
        return map_in_order(function, tiles, self.workers) if rows.device.type == "cpu" else map(function, tiles)

    def _responsibilities(self, joint: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return assign(joint, out) if self.hard else normalise(joint, out)

    def _sums(
        self, rows: Tensor, weights: Tensor | None, parameters: TiledParameters
    ) -> tuple[TileSums, Tensor, Tensor | int]:
        """A tile's sums, log-likelihood and number of rows."""
        phi, joint = _joint(rows, parameters)
        resp, log_likelihood = self._responsibilities(joint, scratch("resp", tuple(joint.shape), joint))
        log_likelihood = log_likelihood + _common(phi, parameters)
        n_rows: Tensor | int = len(rows)
        second_moment, counted = None, phi
        if weights is not None:
            narrow = weights.to(phi.dtype)
            resp.mul_(narrow)
            log_likelihood, n_rows = log_likelihood * weights, weights.double().sum()
            counted = phi if parameters.common is None else phi * narrow
        if parameters.common is not None:
            second_moment = counted @ phi.T
        return TileSums(resp.sum(1), resp @ phi.T, second_moment), log_likelihood.sum(), n_rows

    def _log_likelihood(self, rows: Tensor, parameters: TiledParameters) -> Tensor:
        phi, joint = _joint(rows, parameters)
        return self._responsibilities(joint)[1] + _common(phi, parameters)

    def _top(self, rows: Tensor, parameters: TiledParameters, m: int) -> TopComponents:
        phi, joint = _joint(rows, parameters)
        resp, log_likelihood = self._responsibilities(joint)
        labels = best_of_each(joint)[None] if m == 1 else _ranked(joint, m)
        resp = resp.gather(0, labels)
        return TopComponents(log_likelihood + _common(phi, parameters), labels.T.int(), resp.T.float())


def n_row_features(problem: Problem) -> int:
    """Length of φ(x)."""
    d = problem.n_features
    if problem.covariance_type == "tied":
        return d
    return d + scatter_shape(problem.covariance_type, 1, d)[-1]


def fill_features(phi: Tensor, n_features: int, covariance_type: str) -> None:
    """Complete φ, (F, n), whose first ``n_features`` rows hold x; `natural` has the table."""
    d, x = n_features, phi[:n_features]
    if covariance_type == "diag":
        torch.mul(x, x, out=phi[d:])
    elif covariance_type == "spherical":
        torch.sum(x * x, dim=0, out=phi[d])
    elif covariance_type == "full":
        first = d
        for i in range(d):
            torch.mul(x[i:], x[i], out=phi[first : first + d - i])
            first += d - i


def _joint(rows: Tensor, parameters: TiledParameters) -> tuple[Tensor, Tensor]:
    """Features (F, n) and log joint densities (K, n) without the common term, valid until this thread's next tile."""
    n, d = rows.shape
    k, f = parameters.coefficients.shape
    # Row by row in memory, as the rows come; the many products of `full` are long runs the other way round.
    if parameters.covariance_type == "full":
        phi = scratch("features", (f, n), parameters.coefficients)
    else:
        phi = scratch("features", (n, f), parameters.coefficients).T
    if rows.dtype == torch.float64:  # centred and scaled before it is rounded
        torch.mul(rows.T - parameters.shift, parameters.scale, out=phi[:d])
    else:
        torch.sub(rows.T, parameters.shift.to(phi.dtype), out=phi[:d]).mul_(parameters.scale.to(phi.dtype))
    fill_features(phi, d, parameters.covariance_type)
    joint = scratch("joint", (k, n), phi)
    return phi, torch.addmm(parameters.constants, parameters.coefficients, phi, out=joint)


def _common(phi: Tensor, parameters: TiledParameters) -> Tensor | float:
    """−½ xᵀPx of ``tied``, whose features are x alone."""
    return 0.0 if parameters.common is None else -0.5 * (phi * (parameters.common @ phi)).sum(0)


def normalise(joint: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Responsibilities (K, n) of log joint densities (K, n), and their log-sum-exp (n,) in fp64.

    The log-sum-exp follows from the largest responsibility, exp(max − lse), so that each element is exponentiated
    once; torch's softmax is also several times faster than its exp where most results underflow.
    """
    resp = torch.softmax(joint, dim=0, out=out)
    return resp, joint.amax(0).double() - resp.amax(0).double().log()


def assign(joint: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`normalise` for a hard kernel: one-hot responsibilities (K, n), and the greatest density (n,) in fp64."""
    greatest = joint.amax(0)
    return _one_hot(joint, greatest, torch.empty_like(joint) if out is None else out), greatest.double()


def _ranked(joint: Tensor, m: int) -> Tensor:
    """Indices of the ``m`` greatest of each column of (K, n), (m, n) int64; of equals the first. Spoils ``joint``."""
    if m > _MOST_SEARCHES:
        return joint.argsort(dim=0, descending=True, stable=True)[:m]
    labels = joint.new_empty((m, joint.shape[1]), dtype=torch.int64)
    values = joint.new_empty((m, joint.shape[1]))
    for place in range(m):
        labels[place] = best_of_each(joint)
        torch.gather(joint, 0, labels[place : place + 1], out=values[place : place + 1])
        joint.scatter_(0, labels[place : place + 1], -inf)
    if not (values > -inf).all():
        # Components of no weight are equals of those found before: sorted, all have their places.
        for place in reversed(range(m)):  # what was found twice gets its first value back
            joint.scatter_(0, labels[place : place + 1], values[place : place + 1])
        return joint.argsort(dim=0, descending=True, stable=True)[:m]
    return labels


def best_of_each(joint: Tensor) -> Tensor:
    """Index of the greatest of each column of (K, n), int64; the first of equals.

    Ten times as fast as ``argmax`` along the strided dimension: a comparison and a product.
    """
    one_hot = _one_hot(joint, joint.amax(0), torch.empty_like(joint))
    return (torch.arange(len(joint), dtype=joint.dtype, device=joint.device) @ one_hot).long()


def _one_hot(joint: Tensor, greatest: Tensor, out: Tensor) -> Tensor:
    resp = torch.eq(joint, greatest, out=out)
    if float(resp.sum()) != joint.shape[1]:  # of equals, the first
        resp.zero_().scatter_(0, joint.argmax(0)[None], 1.0)
    return resp


def _log_joint(rows: Tensor, parameters: TiledParameters) -> Tensor:
    phi, joint = _joint(rows, parameters)
    return joint.add_(_common(phi, parameters))
