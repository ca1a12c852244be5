from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamgmm.ann.bootstrap import Draws, interval
from streamgmm.ann.curves import Curve
from streamgmm.ann.evaluation import EvaluationRequest, evaluate
from streamgmm.ann.ground_truth import exact_neighbours
from streamgmm.ann.plot import draw
from streamgmm.ann.table import Cost, Evaluation, Row
from streamgmm.ann.training import train_quantizer
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source
from tests.ann.cases import overlapping, rows_near
from tests.oracles import clustered

ROWS = ["k-means", "k-means, odds", "2-nearest", "SOAR", "AIR", "AIR, odds"]


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rows = clustered(2200, 40, 6, spread=1.0).astype(np.float32)
    return rows[:2000], rows[2000:]


def test_the_whole_table(tmp_path: Path, settings: InferenceSettings, data: tuple[np.ndarray, np.ndarray]) -> None:
    x, queries = data
    mixture = overlapping(k=16, d=6)
    request = EvaluationRequest(k=5, seeds=(0, 1), iterations=5, tuning=0.4)
    found = evaluate(x, queries, mixture, request, settings=settings)
    names = [row.name for row in found.rows]
    assert names[:6] == ROWS
    assert names[6].startswith("k-means, ")
    assert names[7:] == ["model", "model, AIR", "model, AIR, odds", "model, r > 1/K", "model, r > 1/K, posterior"]
    assert (found.n_tuning, found.n_queries, found.n_lists) == (80, 120, 16)
    baseline = found.rows[0]
    for row in found.rows:
        for cost in row.costs:
            assert cost.unique is not None
            assert cost.scanned is not None
            assert row.lists < cost.unique <= cost.scanned + 1e-3
            assert cost.unique <= row.lists + 2000
        # On the first line of every seed: exactly its own.
        assert row.gain(0.99) == pytest.approx(
            baseline.costs[2].unique / row.costs[2].unique  # type: ignore[operator]
        )
    assert baseline.copies == 1
    assert found.rows[2].copies == 2
    assert 1 <= found.rows[4].copies <= 2
    assert found.rows[2].index_bytes == pytest.approx(2 * 2000 * (6 * 4 + 8) + 16 * 24)
    best = next(row for row in found.rows if row.name == found.best)
    assert found.gain_unique_at_99 == best.gain(0.99)
    assert json.loads(json.dumps(found.facts()))["gain_unique_at_99"] == found.gain_unique_at_99
    lines = found.lines()
    assert len(lines) == len(found.rows) + 4 + len(found.warnings())
    assert [cost.recall_at_cost for cost in baseline.costs] == pytest.approx([0.9, 0.95, 0.99], abs=1e-6)
    assert all(cost.recall_at_cost is not None and 0 < cost.recall_at_cost <= 1 for cost in found.rows[2].costs)
    draw(found, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    with pytest.raises(RequestError, match=r"\.svg"):
        draw(found, tmp_path / "p.gif")


def test_speed_is_that_of_a_search_with_the_same_recall(
    settings: InferenceSettings, data: tuple[np.ndarray, np.ndarray]
) -> None:
    pytest.importorskip("faiss")
    x, queries = data
    request = EvaluationRequest(k=5, seeds=(0,), iterations=3)
    found = evaluate(x, queries, None, request, n_lists=8, settings=settings)
    assert all(row.queries_per_second is not None and row.queries_per_second > 0 for row in found.rows)


def test_ranking_by_posterior_is_warned_of() -> None:
    def row(name: str, unique: float | None) -> Row:
        return Row(name, {}, 8, 1.0, 1, 1.0, 1, [Cost(0.9, unique)], [])

    rows = [row("k-means", 9.0), row("m, r > 1/K", 10.0), row("m, r > 1/K, posterior", 25.0)]
    whole = Evaluation(9, 2, 3, 1, 10, 8, rows, "k-means", None, "k-means", None)
    (line,) = whole.warnings()
    assert line.startswith("warning: m, r > 1/K, posterior: 2.5 × the distances at 0.9 ")
    assert line in whole.lines()
    for better in (5.0, None):
        assert not replace(whole, rows=[*rows[:2], row("m, r > 1/K, posterior", better)]).warnings()


def test_more_neighbours_are_known_than_are_asked_for(
    settings: InferenceSettings, data: tuple[np.ndarray, np.ndarray]
) -> None:
    x, queries = data
    request = EvaluationRequest(k=3, seeds=(0,), iterations=2, measure_speed=False)
    truth = exact_neighbours(open_source(x), queries, 9, settings)
    given = evaluate(x, queries, None, request, n_lists=4, truth=truth, settings=settings)
    assert given == evaluate(x, queries, None, request, n_lists=4, settings=settings)
    for wrong in (truth[:5], truth[:, :2], truth + 5000, truth * 1.0):
        with pytest.raises(RequestError, match="truth"):
            evaluate(x, queries, None, request, n_lists=4, truth=wrong, settings=settings)


def test_fewer_vectors_than_neighbours(settings: InferenceSettings, data: tuple[np.ndarray, np.ndarray]) -> None:
    request = EvaluationRequest(k=10, seeds=(0,), iterations=2)
    found = evaluate(data[0][:7], data[1], None, request, n_lists=4, settings=settings)
    assert all(4 < cost.unique <= 12 for row in found.rows for cost in row.costs if cost.unique is not None)


def test_what_cannot_be_is_refused(settings: InferenceSettings, data: tuple[np.ndarray, np.ndarray]) -> None:
    x, queries = data
    with pytest.raises(RequestError, match="neither"):
        evaluate(x, queries, settings=settings)
    with pytest.raises(RequestError, match="only 2000 rows"):
        evaluate(x, queries, n_lists=2001, settings=settings)
    with pytest.raises(RequestError, match="give more"):
        evaluate(x, queries[:1], n_lists=5, settings=settings)
    with pytest.raises(RequestError, match="features"):
        evaluate(x, queries, overlapping(d=5), settings=settings)
    with pytest.raises(RequestError, match="queries must have shape"):
        evaluate(x, queries[:, :3], n_lists=5, settings=settings)
    for wrong in ({"k": 0}, {"recalls": ()}, {"recalls": (1.5,)}, {"seeds": ()}, {"tuning": 1.0}):
        with pytest.raises(RequestError):
            EvaluationRequest(**wrong)  # type: ignore[arg-type]


def test_intervals_cover_what_they_should() -> None:
    """Half of the queries cost 1 and half 3: the mean's standard error is 1/√Q."""
    q = 400
    cost = np.where(np.arange(q) % 2, 1.0, 3.0).astype(np.float32)[:, None]
    one = Curve(np.array([1.0]), np.ones((q, 1), np.float32), cost, cost)
    draws = Draws.of(q, 3, 400, np.random.default_rng(0))
    unique = draws.unique([one, one, one], [0.99])[0]
    assert unique[0] == pytest.approx(2)
    low, high = interval(unique)
    assert low == pytest.approx(2 - 1.96 / 20, abs=0.02)
    assert high == pytest.approx(2 + 1.96 / 20, abs=0.02)
    assert interval(np.full(5, np.nan)) == (None, None)


def test_balance_makes_lists_more_equal(settings: InferenceSettings) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 6)) * rng.gamma(1.5, size=(4000, 1))).astype(np.float32)

    def spread(balance: float) -> float:
        centroids = train_quantizer(x, 30, balance=balance, settings=settings).centroids
        nearest = ((x[:, None] - centroids) ** 2).sum(2).argmin(1)
        sizes = np.bincount(nearest, minlength=30)
        return float((sizes**2).sum())

    plain, mild, strong = (spread(balance) for balance in (0.0, 0.1, 0.3))
    assert strong < mild < plain


def test_a_sample_is_enough_for_centroids(settings: InferenceSettings) -> None:
    x = rows_near(overlapping(k=10), 3000)
    assert train_quantizer(x, 10, sample=500, settings=settings).centroids.shape == (10, 5)
    with pytest.raises(RequestError, match="balance"):
        train_quantizer(x, 10, balance=-0.1, settings=settings)
