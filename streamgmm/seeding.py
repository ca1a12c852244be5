"""First parameters from a uniform sample of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.errors import DataError, RequestError
from streamgmm.frame import Frame
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources.base import Rows, Source
from streamgmm.kernels import Problem
from streamgmm.kernels.tiled import TileSums, fill_features, n_row_features
from streamgmm.mixture import Float64Array, Mixture, covariance_shape
from streamgmm.mstep import m_step
from streamgmm.parallel import map_in_order
from streamgmm.statistics import Statistics
from streamgmm.weighting import Weighting

INIT_METHODS = ("kmeans", "k-means++", "random", "random_from_data")
"""From the sample alone."""

STREAMED = "k-means||"
"""From every row; see `kmeans_parallel`."""

_SAMPLE_BYTES = 64 << 20
_TILE_ROWS = 2048
_LLOYD_ITERATIONS = 10


@dataclass(frozen=True, eq=False)
class Start:
    """Given parameters, as scikit-learn's ``*_init``; None leaves one to the method."""

    weights: Float64Array | None = None
    means: Float64Array | None = None
    precisions: Float64Array | None = None

    @property
    def is_given(self) -> bool:
        """Whether anything is."""
        return any(value is not None for value in (self.weights, self.means, self.precisions))

    def mixture(self, covariance_type: str) -> Mixture | None:
        """What is given, if that is everything."""
        if self.weights is None or self.means is None or self.precisions is None:
            return None
        weights, means = (np.asarray(given, dtype=np.float64) for given in (self.weights, self.means))
        return Mixture(weights, means, _covariances(self.precisions, covariance_type), covariance_type)


def sample_size(n_samples: int, n_features: int, n_components: int) -> int:
    """Rows of the seeding sample: a function of the shape alone, so that memory limits never change a result."""
    wanted = min(max(32_768, 64 * n_components), _SAMPLE_BYTES // (4 * n_features))
    return min(n_samples, max(wanted, 16 * n_components))


def seeding_bytes(problem: Problem, rows: int, workers: int) -> int:
    """Memory that seeding takes besides the stored sample: centred rows twice, norms and distances, tiles and sums."""
    k, d = problem.n_components, problem.n_features
    sums = 4 * k * (1 + n_row_features(problem))
    return 4 * rows * (2 * d + 13) + (workers + 1) * (_TILE_ROWS * 4 * (2 * k + n_row_features(problem)) + sums)


def uniform_rows(n_samples: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` sorted, distinct rows: one drawn uniformly from each of ``count`` equal runs of rows."""
    edges = np.array([i * n_samples // count for i in range(count + 1)], dtype=np.int64)
    return rng.integers(edges[:-1], edges[1:])


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows drawn uniformly, of those that count.

    Attributes
    ----------
    rows : (n, D) array
        Numbers of the stored type; bfloat16 as float32.
    weights : (n,) fp64 array or None
        None where each counts as one.
    rows_read : int
        What storage read for it.
    indices : (n,) int64 array
        Their numbers among all rows, in order.
    beside : (m, D) array
        Rows that were asked for besides, whatever they count.
    """

    rows: Rows
    weights: Float64Array | None
    rows_read: int
    indices: NDArray[np.int64]
    beside: Rows

    def where(self, chosen: NDArray[np.bool_]) -> Sample:
        """The ``chosen`` (n,) rows of it alone."""
        weights = None if self.weights is None else self.weights[chosen]
        return replace(self, rows=self.rows[chosen], weights=weights, indices=self.indices[chosen])


_NO_ROWS = np.empty(0, dtype=np.int64)


def draw_sample(
    source: Source,
    n_components: int,
    seed: int,
    weighting: Weighting | None = None,
    beside: NDArray[np.int64] = _NO_ROWS,
    size: int | None = None,
) -> Sample:
    """The seeding sample; held-out rows, weightless ones, and skipped ones are not in it.

    The rows at sorted, distinct ``beside`` are gathered with it, so that no row is read twice. It is drawn as ``size``
    rows, at most all; `sample_size` where that is not given.

    Raises
    ------
    DataError
        A sampled row holds NaN or infinity, or too few rows are left.
    """
    weighting = weighting or Weighting()
    n, d = source.shape
    rng = np.random.default_rng([seed, 0])
    indices = uniform_rows(n, min(n, size or sample_size(n, d, n_components)), rng)
    weights = weighting.of_rows(indices)
    wanted = np.union1d(indices, beside) if len(beside) else indices
    gathered, rows_read = source.gather(wanted)
    rows = gathered if wanted is indices else gathered[np.searchsorted(wanted, indices)]
    others = gathered[np.searchsorted(wanted, beside)]
    keep = np.ones(len(rows), dtype=bool) if weights is None else weights > 0
    if weighting.skip_nonfinite and values(rows).dtype.kind == "f":
        keep &= np.isfinite(values(rows)).all(axis=1)
    if not keep.all():
        rows, indices = rows[keep], indices[keep]
        weights = None if weights is None else weights[keep]
        if len(rows) < n_components:
            raise DataError(
                f"{source.name}: only {len(rows)} of {len(keep)} sampled rows count (positive weight, finite, not held "
                f"out), fewer than {n_components} components; check the weights and the data, or ask for fewer"
            )
    check_finite(source, rows, indices)
    # Rows that are merely some of all are drawn from as if they were all.
    uniform = weights is None or bool((weights == 1).all())
    return Sample(values(rows), None if uniform else weights, rows_read, indices, others)


def check_finite(source: Source, rows: Rows, indices: NDArray[np.int64]) -> None:
    """Raise DataError, naming file, row and column, if ``rows`` (those at ``indices``) hold NaN or infinity."""
    rows = values(rows)
    if rows.dtype.kind != "f":
        return
    bad = ~np.isfinite(rows)
    if bad.any():
        row, column = (int(i[0]) for i in np.nonzero(bad))
        raise DataError(
            f"{source.locate(int(indices[row]))}: column {column} is {rows[row, column]}; "
            "remove or impute rows that are not finite"
        )


def first_mixture(
    sample: Tensor,
    frame: Frame,
    n_components: int,
    covariance_type: str,
    method: str,
    start: Start,
    reg_covar: float,
    seed: list[int],
    workers: int,
    weights: Tensor | None = None,
) -> Mixture:
    """Parameters to start EM from.

    Parameters
    ----------
    sample : (n, D) tensor
        Rows of the stored type, on the device that is to do the work.
    method : {'kmeans', 'k-means++', 'random', 'random_from_data'}
        ``k-means++`` assigns each sampled row to the nearest of K greedily drawn centres (Arthur & Vassilvitskii 2007);
        ``kmeans`` moves them by ten Lloyd iterations first; ``random_from_data`` takes random rows as centres;
        ``random`` draws responsibilities. Means given in ``start`` take the place of the centres.
    weights : (n,) tensor, optional
        What each row counts; positive.
    """
    if (given := start.mixture(covariance_type)) is not None:
        return given
    points = _Points(frame.apply(sample, torch.float32), workers, weights)
    rng = np.random.default_rng(seed)
    pooled = _pooled(points, frame, n_components, covariance_type, reg_covar)
    if start.means is not None:
        means = np.asarray(start.means, dtype=np.float64)
        centres = torch.tensor((means - frame.shift) * frame.scale, dtype=torch.float32, device=sample.device)
        statistics = points.label_statistics(points.nearest(centres), n_components, covariance_type)
    elif method == "random":
        centres = points.x[:1].expand(n_components, -1)
        statistics = points.random_statistics(n_components, covariance_type, rng)
    else:
        centres = _centres(points, n_components, method, rng)
        statistics = points.label_statistics(points.nearest(centres), n_components, covariance_type)
    fallback = Mixture(
        pooled.weights, centres.double().cpu().numpy() / frame.scale + frame.shift, pooled.covariances, covariance_type
    )
    mixture = m_step(frame.restore(statistics), reg_covar, fallback).mixture
    return _override(_shrunk(mixture, statistics.counts.cpu().numpy()), start)


def first_centres(
    sample: Tensor,
    frame: Frame,
    n_components: int,
    method: str,
    start: Start,
    seed: list[int],
    workers: int,
    weights: Tensor | None = None,
) -> tuple[Float64Array, float]:
    """Centres (K, D) to start k-means from, and the sample's mean variance a feature, in the data's units.

    ``random`` takes random rows, as k-means has no other; the rest as `first_mixture`.
    """
    points = _Points(frame.apply(sample, torch.float32), workers, weights)
    rng = np.random.default_rng(seed)
    variance = float(_pooled(points, frame, 1, "spherical", 0.0).covariances[0])
    if start.means is not None:
        return np.array(start.means, dtype=np.float64), variance
    centres = _centres(points, n_components, "random_from_data" if method == "random" else method, rng)
    return np.asarray(centres.double().cpu().numpy() / frame.scale + frame.shift), variance


def centres_among(
    rows: Tensor, counts: Tensor, frame: Frame, n_components: int, seed: list[int], workers: int
) -> Float64Array:
    """Means (K, D) in the data's units: k-means of ``rows`` (m, D) that count ``counts`` (m,), all positive."""
    points = _Points(frame.apply(rows, torch.float32), workers, counts)
    centres = _centres(points, n_components, "kmeans", np.random.default_rng(seed))
    return np.asarray(centres.double().cpu().numpy() / frame.scale + frame.shift)


def _centres(points: _Points, n_components: int, method: str, rng: np.random.Generator) -> Tensor:
    """Centres (K, D) among, or near, the points."""
    if method == "random_from_data":
        chosen = rng.choice(len(points.x), n_components, replace=False, p=points.probabilities)
        return points.x[torch.from_numpy(chosen).to(points.x.device)]
    if method not in ("kmeans", "k-means++"):
        raise RequestError(f"init must be one of {', '.join(INIT_METHODS)}, or a file of means; got {method!r}")
    centres = kmeans_plus_plus(points, n_components, rng)
    return _lloyd(points, centres) if method == "kmeans" else centres


def _shrunk(mixture: Mixture, counts: Float64Array) -> Mixture:
    """``mixture`` with each covariance drawn towards their mean, as if by one more row (D rows for ``full``).

    A component seeded on a single row would otherwise have no variance but the regularisation, and one on fewer than
    D rows a singular matrix: needles that attract nothing and that only fp64 can evaluate.
    """
    kind, covariances = mixture.covariance_type, mixture.covariances
    if kind == "tied":
        return mixture
    n = counts.reshape(-1, *([1] * (covariances.ndim - 1)))
    extra = mixture.n_features if kind == "full" else 1
    mean = (n * covariances).sum(axis=0) / counts.sum()
    return Mixture(mixture.weights, mixture.means, (n * covariances + extra * mean) / (n + extra), kind)


def _override(mixture: Mixture, start: Start) -> Mixture:
    """``mixture`` with the given parameters in place of its own."""
    kind = mixture.covariance_type
    return Mixture(
        mixture.weights if start.weights is None else np.asarray(start.weights, dtype=np.float64),
        mixture.means if start.means is None else np.asarray(start.means, dtype=np.float64),
        mixture.covariances if start.precisions is None else _covariances(start.precisions, kind),
        kind,
    )


def _covariances(precisions: Float64Array, covariance_type: str) -> Float64Array:
    """The inverses of precisions, fp64."""
    exact = np.asarray(precisions, dtype=np.float64)
    flat = covariance_type in ("diag", "spherical")
    return 1.0 / exact if flat else np.asarray(np.linalg.inv(exact), dtype=np.float64)


class _Points:
    """The sample in the frame's coordinates, and sums over it in tiles of fixed size, in a fixed order."""

    def __init__(self, x: Tensor, workers: int, weights: Tensor | None = None) -> None:
        self.x = x
        self.probabilities = None if weights is None else (weights / weights.sum()).cpu().numpy()
        self.weights = torch.ones(len(x), device=x.device) if weights is None else weights.to(x)
        self.norms = torch.cat([(tile**2).sum(1) for tile in x.split(_TILE_ROWS)])
        self._workers = workers

    def map(self, function: Any, *along: Tensor, rows: int = _TILE_ROWS) -> Iterator[Any]:
        """``function(tile, ...)`` for each tile of ``rows``, with the matching pieces of ``along``, in order."""
        pieces = zip(*(tensor.split(rows) for tensor in (self.x, *along)), strict=True)
        if self.x.device.type != "cpu":
            return (function(*piece) for piece in pieces)
        return map_in_order(lambda piece: function(*piece), pieces, self._workers)

    def squared_distances(self, centres: Tensor, *along: Tensor, then: Any, rows: int = _TILE_ROWS) -> Iterator[Any]:
        """``then(distances (rows, K), ...)`` of each tile of ``rows``, in order."""
        norms = (centres**2).sum(1)

        def on_tile(tile: Tensor, own: Tensor, *pieces: Tensor) -> Any:
            cross = torch.addmm(norms, tile, centres.T, alpha=-2)
            return then(cross.add_(own[:, None]).clamp_(min=0), *pieces)

        return self.map(on_tile, self.norms, *along, rows=rows)

    def rows_at_once(self, n_components: int, n_centres: int) -> int:
        """Rows whose distances to some centres take, with what is made of them, what a tile's to all components do.

        A GPU would be kept waiting for the launches of small tiles; on a CPU these stay in its caches.
        """
        on_gpu = self.x.device.type == "cuda"
        return max(_TILE_ROWS, _TILE_ROWS * n_components // (2 * n_centres)) if on_gpu else _TILE_ROWS

    def nearest(self, centres: Tensor) -> Tensor:
        """Index of the nearest centre, (n,) int64."""
        return torch.cat(list(self.squared_distances(centres, then=lambda distances: distances.argmin(1))))

    def label_statistics(self, labels: Tensor, n_components: int, covariance_type: str) -> Statistics:
        """Statistics of a hard assignment, in the frame's coordinates."""

        def one_hot(tile: Tensor, tile_labels: Tensor) -> Tensor:
            resp = tile.new_zeros((n_components, len(tile)))
            return resp.scatter_(0, tile_labels[None], 1.0)

        return self._statistics(n_components, covariance_type, one_hot, labels)

    def random_statistics(self, n_components: int, covariance_type: str, rng: np.random.Generator) -> Statistics:
        """Statistics of responsibilities drawn uniformly and normalised, as scikit-learn's ``random``."""
        seeds = torch.from_numpy(rng.integers(2**62, size=-(-len(self.x) // _TILE_ROWS))).repeat_interleave(_TILE_ROWS)

        def drawn(tile: Tensor, tile_seeds: Tensor) -> Tensor:
            resp = np.random.default_rng(int(tile_seeds[0])).random((n_components, len(tile)), dtype=np.float32)
            return torch.from_numpy(resp / resp.sum(0)).to(tile.device)

        return self._statistics(n_components, covariance_type, drawn, seeds[: len(self.x)])

    def _statistics(self, n_components: int, kind: str, responsibilities: Any, along: Tensor) -> Statistics:
        d = self.x.shape[1]
        device = self.x.device
        total = Statistics.zeros(kind, n_components, torch.zeros(d), device)

        def on_tile(tile: Tensor, piece: Tensor, weights: Tensor) -> TileSums:
            phi = tile.new_empty((n_row_features(Problem(n_components, d, kind)), len(tile)))
            phi[:d] = tile.T
            fill_features(phi, d, kind)
            resp = responsibilities(tile, piece).mul_(weights)
            return TileSums(resp.sum(1), resp @ phi.T, (phi * weights) @ tile if kind == "tied" else None)

        for sums in self.map(on_tile, along, self.weights):
            sums.add_to(total)
        return total


def _pooled(points: _Points, frame: Frame, n_components: int, kind: str, reg_covar: float) -> Mixture:
    """Equal weights and the whole sample's covariance for every component: what an empty one falls back to."""
    d = points.x.shape[1]
    labels = torch.zeros(len(points.x), dtype=torch.int64, device=points.x.device)
    any_mixture = Mixture(np.ones(1), np.zeros((1, d)), np.ones(covariance_shape(kind, 1, d)), kind)
    one = m_step(frame.restore(points.label_statistics(labels, 1, kind)), reg_covar, any_mixture).mixture
    shape = covariance_shape(kind, n_components, d)
    return Mixture(
        np.full(n_components, 1 / n_components),
        np.repeat(one.means, n_components, axis=0),
        np.broadcast_to(one.covariances, shape),
        kind,
    )


def kmeans_plus_plus(points: _Points, n_components: int, rng: np.random.Generator) -> Tensor:
    """K centres (K, D) among the points, each the best of 2 + ⌊log K⌋ drawn by squared distance to those before it.

    Greedy k-means++: Arthur & Vassilvitskii (2007), §2.2 and the remark on trials in §7.
    """
    x = points.x
    trials = 2 + int(np.log(n_components))
    rows = points.rows_at_once(n_components, trials)
    chosen = [int(rng.choice(len(x), p=points.probabilities))]
    weights = points.weights
    first = list(points.squared_distances(x[chosen], then=lambda distances: distances[:, 0]))
    nearest = torch.cat(first)
    for _ in range(1, n_components):
        # Drawn on the host: a cumulative sum on a GPU has no fixed order.
        cumulative = np.cumsum((nearest * weights).double().cpu().numpy())
        if cumulative[-1] > 0:
            draws = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1], side="right")
        else:  # every point coincides with a centre: any other will do
            draws = rng.integers(len(x), size=trials)
        candidates = torch.from_numpy(np.minimum(draws, len(x) - 1)).to(x.device)
        improved = list(points.squared_distances(x[candidates], nearest, weights, then=_nearer, rows=rows))
        best = int(torch.stack([potential for _, potential in improved]).sum(0).argmin())
        chosen.append(int(candidates[best]))
        nearest = torch.cat([tile[:, best] for tile, _ in improved])
    return x[chosen]


def _nearer(distances: Tensor, nearest: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the nearest centre if each candidate were one, and their weighted sums."""
    nearer = torch.minimum(distances, nearest[:, None])
    return nearer, (nearer * weights[:, None]).sum(0, dtype=torch.float64)


def _lloyd(points: _Points, centres: Tensor) -> Tensor:
    """Up to ten Lloyd iterations; a centre without points stays where it is."""
    labels = points.nearest(centres)
    for _ in range(_LLOYD_ITERATIONS):
        statistics = points.label_statistics(labels, len(centres), "spherical")
        means = (statistics.sums / torch.where(statistics.counts > 0, statistics.counts, 1.0)[:, None]).float()
        centres = torch.where(statistics.counts[:, None] > 0, means, centres)
        moved = points.nearest(centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    return centres
