"""Recall against distance computations: every policy beside the baselines that it must beat.

Settings, and the odds that `Probing` stops by, come from tuning queries; what is reported is measured on the others.
The cost at a recall is the mean over test queries where their mean recall just reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.bootstrap import Draws, interval
from streamgmm.ann.curves import Curve
from streamgmm.ann.ground_truth import checked_truth, exact_neighbours
from streamgmm.ann.layout import Layout, Table, copies_of, lay_out, sizes_of
from streamgmm.ann.policies import Policy
from streamgmm.ann.postings import imbalance
from streamgmm.ann.probing import Probing
from streamgmm.ann.quantizer import Quantizer, quantizer_of
from streamgmm.ann.table import BY_POSTERIOR, Cost, Evaluation, Row
from streamgmm.ann.throughput import queries_per_second
from streamgmm.ann.training import train_quantizer
from streamgmm.ann.ways import Asked, Ways
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source

RECALLS = (0.90, 0.95, 0.99)
TUNED_FOR = 0.99

TOP1 = Policy("top1")
PAPERS = Policy("resp", max_copies=8)
"""Flash-GMM's: every component with more than 1/K."""

GRIDS: Mapping[str, Sequence[Policy]] = {
    "2-nearest": [Policy("top2")],
    "SOAR": [Policy("soar", strength=strength) for strength in (0.5, 1.0, 2.0)],
    "AIR": [Policy("air", strength=strength) for strength in (0.25, 0.5, 0.75, 1.0, 1.5)],
}
"""The policies beside k-means, and the settings among which each one's is chosen."""

_DRAWS = 200
_CURVE_RECALLS = np.concatenate([np.arange(0.5, 0.95, 0.05), np.arange(0.95, 0.9951, 0.005)])

Told = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes
    ----------
    k : int
        Neighbours asked for.
    recalls : sequence of float
    seeds : sequence of int
        Of the k-means that the policies are laid over.
    tuning : float
        Share of the queries on which settings are chosen.
    iterations : int
        Of k-means, at most.
    measure_speed : bool
        Measure faiss's queries per second.
    """

    k: int = 10
    recalls: Sequence[float] = RECALLS
    seeds: Sequence[int] = (0, 1, 2)
    tuning: float = 0.3
    iterations: int = 25
    measure_speed: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RequestError(f"k must be at least 1; got {self.k}")
        if not self.recalls or not all(0 < recall <= 1 for recall in self.recalls):
            raise RequestError(f"recalls must lie above 0 and be at most 1; got {list(self.recalls)}")
        if not self.seeds:
            raise RequestError("seeds names no seed; give at least one")
        if not 0 < self.tuning < 1:
            raise RequestError(f"tuning must lie between 0 and 1; got {self.tuning}")


def evaluate(
    data: Any,
    queries: NDArray[Any],
    model: Any = None,
    request: EvaluationRequest | None = None,
    *,
    n_lists: int | None = None,
    truth: NDArray[np.int64] | None = None,
    settings: InferenceSettings | None = None,
    told: Told | None = None,
) -> Evaluation:
    """The whole table for ``data`` and ``queries`` (Q, D). Memory grows with the number of vectors, 8 bytes a copy.

    Parameters
    ----------
    model : anything `quantizer_of` takes, or a mapping of names to such, optional
        Their lists stand in the table too; the first one's number of components is the baselines' number of lists.
    n_lists : int, optional
        That number, where there is no model.
    truth : (Q, k) array, optional
        Row numbers of the true neighbours; computed where they are not given.
    told : callable, optional
        Told in a line what is done next.

    Raises
    ------
    RequestError
        Dimensions disagree, fewer than two queries, neither model nor ``n_lists``, or more lists than rows.
    DataError
        A row or a query holds NaN or infinity.
    """
    source, request, told = open_source(data), request or EvaluationRequest(), told or (lambda line: None)
    settings = settings or InferenceSettings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    named = model if isinstance(model, Mapping) else {} if model is None else {"model": model}
    own = {name: quantizer_of(one) for name, one in named.items()}
    lists = next((one.n_lists for one in own.values()), n_lists)
    if lists is None:
        raise RequestError("neither a model nor n_lists is given; give one")
    if lists > source.shape[0]:
        raise RequestError(f"{lists} lists and {source.name} has only {source.shape[0]} rows; use fewer")
    if len(queries) < 2:
        raise RequestError(f"{len(queries)} queries cannot be divided into tuning and test queries; give more")
    for one in own.values():
        one.check_features(source.name, source.shape[1])
    if truth is None:
        told("exact neighbours")
        truth = exact_neighbours(source, queries, request.k, settings)
    truth = checked_truth(truth, len(queries), source.shape[0], request.k)
    order = np.random.default_rng(0).permutation(len(queries))
    cut = min(max(1, round(request.tuning * len(queries))), len(queries) - 1)
    x = np.asarray(queries, np.float32)
    tuning, testing = (Asked(x[part], truth[part]) for part in (order[:cut], order[cut:]))
    job = _Job(source, tuning, testing, request, settings, told)
    by_name: dict[str, list[_Measured]] = {}
    for name, measured in _measurements(job, own, lists):
        by_name.setdefault(name, []).append(measured)
    return _summary(job, by_name, lists)


@dataclass(frozen=True, eq=False)
class _Job:
    source: Source
    tuning: Asked
    testing: Asked
    request: EvaluationRequest
    settings: InferenceSettings
    told: Told


@dataclass(frozen=True, eq=False)
class _Measured:
    """One setting over one quantizer."""

    policy: Policy
    probing: Probing
    quantizer: Quantizer
    table: Table
    tuned: float
    """Unique distances at the recall that settings are chosen for, on tuning queries; infinite where it is missed."""
    testing: Curve


def _measurements(job: _Job, own: Mapping[str, Quantizer], lists: int) -> Iterator[tuple[str, _Measured]]:
    """Every row's measurement for every seed, by the row's name."""
    more = 0
    for seed in job.request.seeds:
        job.told(f"k-means with {lists} lists, seed {seed}")
        quantizer = _kmeans(job, lists, seed)
        policies = [TOP1, *(policy for grid in GRIDS.values() for policy in grid)]
        layout = lay_out(job.source, quantizer, policies, job.settings)
        ways = _ways(job, layout)
        tables = dict(zip(policies, layout.tables, strict=True))
        yield "k-means", _measure(ways, TOP1, tables[TOP1])
        yield "k-means, odds", _measure(ways, TOP1, tables[TOP1], "odds")
        for name, grid in GRIDS.items():
            policy = min(grid, key=lambda one: ways.plain_cost(tables[one], TUNED_FOR))
            yield name, _measure(ways, policy, tables[policy])
            if name == "AIR":
                yield f"{name}, odds", _measure(ways, policy, tables[policy], "odds")
                more = more or min(max(lists + 1, round(copies_of(tables[policy]) * lists)), job.source.shape[0])
        job.told(f"k-means with {more} lists, seed {seed}")
        layout = lay_out(job.source, _kmeans(job, more, seed), [TOP1], job.settings)
        yield f"k-means, {more} lists", _measure(_ways(job, layout), TOP1, layout.tables[0])
    for name, one in own.items():
        yield from _of_model(job, name, one)


def _of_model(job: _Job, name: str, own: Quantizer) -> Iterator[tuple[str, _Measured]]:
    """A given model's lists, and the paper's."""
    job.told(name)
    papers = [PAPERS] if own.has_responsibilities else []
    policies = [TOP1, *GRIDS["AIR"], *papers]
    layout = lay_out(job.source, own, policies, job.settings)
    ways, tables = _ways(job, layout), dict(zip(policies, layout.tables, strict=True))
    yield name, _measure(ways, TOP1, tables[TOP1])
    policy = min(GRIDS["AIR"], key=lambda one: ways.plain_cost(tables[one], TUNED_FOR))
    yield f"{name}, AIR", _measure(ways, policy, tables[policy])
    yield f"{name}, AIR, odds", _measure(ways, policy, tables[policy], "odds")
    if papers:
        yield f"{name}, r > 1/K", _measure(ways, PAPERS, tables[PAPERS])
        yield f"{name}, r > 1/K{BY_POSTERIOR}", _measure(ways, PAPERS, tables[PAPERS], "posterior")


def _ways(job: _Job, layout: Layout) -> Ways:
    return Ways(layout, (job.tuning, job.testing), max(*job.request.recalls, TUNED_FOR))


def _measure(ways: Ways, policy: Policy, table: Table, way: str = "count") -> _Measured:
    probing, (tuning, testing) = ways.curves(table, way)
    point = tuning.at(TUNED_FOR)
    return _Measured(policy, probing, ways.quantizer, table, float("inf") if point is None else point.unique, testing)


def _kmeans(job: _Job, lists: int, seed: int) -> Quantizer:
    return train_quantizer(job.source, lists, seed=seed, max_iter=job.request.iterations, settings=job.settings)


def _summary(job: _Job, by_name: Mapping[str, list[_Measured]], lists: int) -> Evaluation:
    draws = Draws.of(len(job.testing.queries), len(job.request.seeds), _DRAWS, np.random.default_rng(0))
    kmeans = [one.testing for one in by_name["k-means"]]
    rows = [_row(job, name, measured, draws, kmeans) for name, measured in by_name.items()]
    tuned = {name: float(np.mean([one.tuned for one in measured])) for name, measured in by_name.items()}
    eligible = [row for row in rows if row.copies <= 2 and row.lists == lists]
    best = min(eligible, key=lambda row: tuned[row.name])
    fixed = min((row for row in eligible if row.settings["probing"] == "count"), key=lambda row: tuned[row.name])
    return Evaluation(
        *job.source.shape,
        len(job.testing.queries),
        len(job.tuning.queries),
        job.request.k,
        lists,
        rows,
        best.name,
        best.gain(TUNED_FOR),
        fixed.name,
        fixed.gain(TUNED_FOR),
    )


def _row(job: _Job, name: str, measured: list[_Measured], draws: Draws, kmeans: Sequence[Curve]) -> Row:
    job.told(f"summary of {name}")
    first = measured[0]
    k, d = first.quantizer.centroids.shape
    curves = [one.testing for one in measured]
    unique, baseline = (draws.unique(some, job.request.recalls) for some in (curves, kmeans))
    costs = [
        _cost_at(curves, recall, own, base, _recall_at_cost(curves, kmeans, recall))
        for recall, own, base in zip(job.request.recalls, unique, baseline, strict=True)
    ]
    copies = float(np.mean([copies_of(one.table) for one in measured]))
    speed = None
    if job.request.measure_speed and costs[-1].value is not None:
        probing = first.probing.at(costs[-1].value)
        speed = queries_per_second(
            job.source, first.quantizer, first.table, probing, job.testing.queries, job.request.k
        )
    threshold = first.policy.threshold
    return Row(
        name,
        {
            "policy": first.policy.name,
            "strength": first.policy.lam,
            "threshold": threshold,
            "probing": first.probing.stop if first.probing.ranking == "distance" else "posterior",
        },
        k,
        copies,
        round(copies * len(first.table) * (4 * d + 8) + 4 * k * d),
        float(np.mean([imbalance(sizes_of(one.table, k)) for one in measured])),
        len(measured),
        costs,
        [(float(r), point.unique) for r in _CURVE_RECALLS if (point := first.testing.at(float(r))) is not None],
        speed,
    )


def _cost_at(
    curves: Sequence[Curve],
    recall: float,
    unique: NDArray[np.float64],
    baseline: NDArray[np.float64],
    at_cost: float | None,
) -> Cost:
    points = [point for one in curves if (point := one.at(recall)) is not None]
    if len(points) < len(curves):
        return Cost(recall, recall_at_cost=at_cost)
    gains = baseline / unique
    (low, high), (gain_low, gain_high) = interval(unique), interval(gains)
    return Cost(
        recall,
        float(unique[0]),
        float(np.mean([point.scanned for point in points])),
        low,
        high,
        float(gains[0]) if np.isfinite(gains[0]) else None,
        gain_low,
        gain_high,
        points[0].value,
        at_cost,
    )


def _recall_at_cost(curves: Sequence[Curve], kmeans: Sequence[Curve], recall: float) -> float | None:
    """Mean over seeds of the recall with what k-means of that seed needs for ``recall``; None where one is unknown."""
    points = [one.at(recall) for one in kmeans]
    found = [
        None if point is None else curves[seed % len(curves)].recall_at(point.unique)
        for seed, point in enumerate(points)
    ]
    there = [value for value in found if value is not None]
    return float(np.mean(there)) if len(there) == len(found) else None
