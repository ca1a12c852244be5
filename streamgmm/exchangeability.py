"""Is the order of the rows exchangeable? A test from few rows, made before any is trained on.

The statistic is the design effect (Kish 1965): the variance of the means of steps, of bounded features of the rows,
over what it would be for independent rows. It is near 1 in random order; where it is 30, a step of 30,000 rows tells as
much as 1,000 do, and stepwise EM forgets more than it learns.

Two samples look at two scales. Rows drawn evenly from the whole file show how steps differ from one another: clusters
in order, drift, files of different kinds. Short runs of neighbours show what a run has in common: frames of a film,
patches of a picture. What neither shows is a drift of less than about a twentieth of a standard deviation from step to
step.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.io.bfloat16 import values
from streamgmm.io.sources.base import Rows, Source
from streamgmm.mixture import Float64Array

GROUPS = 50
"""Parts of the data whose means are compared: as many as there are steps in a pass."""

_RUNS = 4 * GROUPS
_RUN_ROWS = (8, 256)
_RUN_BYTES = 16 << 20
_BOUND = 3.0
_RISK = 1e-6


def run_rows(n_features: int) -> int:
    """Rows of one of the short runs: 256, or as many fewer as keep all of them within 16 MiB of float32."""
    return min(max(_RUN_BYTES // (4 * n_features * _RUNS), _RUN_ROWS[0]), _RUN_ROWS[1])


def run_bytes(source: Source) -> int:
    """Memory that the rows of `runs` take, with what is looked at of them at once."""
    rows = min(source.shape[0], _RUNS * run_rows(source.shape[1]))
    return 2 * rows * source.shape[1] * source.dtype.itemsize


def runs(n_samples: int, n_features: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of 200 short runs, one drawn from each 200th of the data, sorted."""
    rows = run_rows(n_features)
    edges = np.array([i * n_samples // _RUNS for i in range(_RUNS + 1)], dtype=np.int64)
    starts = rng.integers(edges[:-1], np.maximum(edges[1:] - rows, edges[:-1]) + 1)
    return np.concatenate([np.arange(a, min(a + rows, b)) for a, b in zip(starts, edges[1:], strict=True)])


def design_effect(rows: Rows, indices: NDArray[np.int64], n_samples: int) -> float:
    """The largest design effect over features of ``rows`` (n, D) at sorted ``indices``; 0 where nothing varies.

    The features are z and z² of the standardised rows, cut off at three deviations: bounded, so that outliers prove
    nothing. Rows that are not finite are left out.
    """
    numbers = values(rows)
    cuts = np.searchsorted(indices * GROUPS // n_samples, np.arange(GROUPS + 1))
    groups = [_finite(numbers[a:b]) for a, b in pairwise(cuts)]
    groups = [group for group in groups if len(group)]
    if len(groups) < 2:
        return 0.0
    with np.errstate(over="ignore"):  # what has no finite variance says nothing here
        centre, scale = _location(groups)
        return float(_design_effects(_features(group, centre, scale) for group in groups).max(initial=0.0))


def limit(n_features: int, groups: int = GROUPS) -> float:
    """What the largest effect exceeds for one exchangeable file in a million, however its features correlate.

    (groups − 1) × effect is χ² for independent rows, by the central limit theorem; 2·D features share the risk equally.
    The quantile of χ² is Wilson & Hilferty's (1931), whose error here is below one percent.
    """
    spread = 2 / (9 * (groups - 1))
    return float((1 - spread - NormalDist().inv_cdf(_RISK / (2 * n_features)) * spread**0.5) ** 3)


_Moments = tuple[Float64Array, Float64Array, int]


def _finite(numbers: Rows) -> Rows:
    if numbers.dtype.kind != "f":
        return numbers
    kept = np.isfinite(numbers).all(axis=1)
    return numbers if kept.all() else numbers[kept]


def _location(groups: list[NDArray[Any]]) -> tuple[Float64Array, Float64Array]:
    """Mean and deviation of each feature; a constant one has deviation infinity, so that nothing of it is left."""
    n = sum(len(group) for group in groups)
    mean: Float64Array = np.sum([group.sum(axis=0, dtype=np.float64) for group in groups], axis=0) / n
    deviation = np.sqrt(np.sum([((group - mean) ** 2).sum(axis=0) for group in groups], axis=0) / n)
    return mean, np.where(deviation > 0, deviation, np.inf)


def _features(numbers: Rows, centre: Float64Array, scale: Float64Array) -> _Moments:
    """Mean and mean square of a group's features (2D,), and its rows."""
    z = np.clip((numbers.astype(np.float64) - centre) / scale, -_BOUND, _BOUND)
    both = np.concatenate([z, z**2], axis=1)
    return both.mean(axis=0), (both**2).mean(axis=0), len(both)


def _design_effects(groups: Iterable[_Moments]) -> Float64Array:
    """Variance of the groups' means over that of as many independent rows, for each feature that varies."""
    means, squares, rows = (np.array(each) for each in zip(*groups, strict=True))
    mean, square = (np.average(each, axis=0, weights=rows) for each in (means, squares))
    variance = square - mean**2
    varying = variance > 1e-12
    between = (rows[:, None] * (means - mean) ** 2)[:, varying].sum(axis=0)
    return np.asarray(between / variance[varying] / (len(rows) - 1))
