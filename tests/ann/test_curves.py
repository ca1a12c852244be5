from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streamgmm.ann import curves
from streamgmm.ann.curves import Curve, curve, tally
from streamgmm.ann.probing import Probing, rank_lists
from streamgmm.ann.quantizer import quantizer_of
from tests.ann.cases import overlapping, rows_near


def table_of(n: int, k: int, columns: int, seed: int = 0) -> np.ndarray:
    """Different lists a row, some rows with fewer."""
    rng = np.random.default_rng(seed)
    table = np.argsort(rng.random((n, k)), axis=1)[:, :columns].astype(np.int32)
    if columns > 1:
        table[:, 1:][rng.random((n, columns - 1)) < 0.4] = -1
    return table


def brute(lists: np.ndarray, table: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found, unique, scanned = (np.zeros(lists.shape) for _ in range(3))
    for q, row in enumerate(lists):
        for p in range(len(row)):
            seen = np.isin(table, row[: p + 1])
            scanned[q, p] = seen.sum()
            unique[q, p] = seen.any(1).sum()
            own = truth[q][truth[q] >= 0]
            found[q, p] = seen.any(1)[own].mean()
    return found, unique, scanned


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("pairs", [True, False])
def test_tally_is_that_of_brute_force(columns: int, pairs: bool, monkeypatch: Any) -> None:
    k, n, q = 9, 211, 33
    if not pairs:
        monkeypatch.setattr(curves, "_PAIR_LISTS", 0)
    quantizer = quantizer_of(overlapping(k=k))
    queries = rows_near(quantizer.mixture, q)
    truth = np.random.default_rng(0).integers(0, n, (q, 4))
    truth[3, 2:] = -1
    table = table_of(n, k, columns)
    ranked = rank_lists(torch.from_numpy(queries), quantizer, Probing(most=6))
    got = tally(ranked, table, truth, k)
    found, unique, scanned = brute(ranked.lists.numpy(), table, truth)
    np.testing.assert_allclose(got.found, found, rtol=1e-6)
    np.testing.assert_array_equal(got.unique, unique)
    np.testing.assert_array_equal(got.scanned, scanned)


def test_a_point_between_two_values() -> None:
    grown = np.array([[0.0, 0.5, 1.0], [0.5, 0.5, 1.0]], np.float32)
    one = Curve(np.arange(1.0, 4), grown, 100 * grown, 200 * grown)
    point = one.at(0.75)
    assert point is not None
    assert (point.value, point.unique, point.scanned) == (3, 75, 150)
    first = one.at(0.1)
    assert first is not None
    assert first.unique == 25
    assert one.at(1.0) is not None
    assert Curve(one.values, 0.9 * grown, grown, grown).at(0.95) is None


@pytest.mark.parametrize("stop", ["margin", "mass"])
def test_thresholds_are_those_of_searching(stop: str) -> None:
    """A curve on a grid of values says what stopping at those values finds."""
    quantizer = quantizer_of(overlapping(k=12))
    queries = rows_near(quantizer.mixture, 50)
    table = table_of(300, 12, 2)
    truth = np.random.default_rng(1).integers(0, 300, (50, 5))
    ranked = rank_lists(torch.from_numpy(queries), quantizer, Probing(stop=stop, value=0.5))
    tallied = tally(ranked, table, truth, 12)
    drawn = curve(ranked, tallied, 12, by_count=False)
    for at in (0, len(drawn.values) // 2, -1):
        kept = ranked.kept(float(drawn.values[at])) - 1
        np.testing.assert_array_equal(drawn.recall[:, at], tallied.found.gather(1, kept[:, None])[:, 0])
        np.testing.assert_array_equal(drawn.unique[:, at], tallied.unique.gather(1, kept[:, None])[:, 0] + 12)
    assert drawn.recall[:, -1].mean() == 1
    assert drawn.at(1.0) is not None


def test_recall_at_a_cost_is_the_inverse_of_cost_at_a_recall() -> None:
    rng = np.random.default_rng(0)
    parts = [np.sort(rng.random((9, 20)).astype(np.float32), axis=1) for _ in range(2)]
    one = Curve(np.arange(20.0), parts[0], 50 * parts[1], 60 * parts[1])
    for recall in (0.3, 0.5, 0.8):
        point = one.at(recall)
        assert point is not None
        assert one.recall_at(point.unique) == pytest.approx(recall)
    assert one.recall_at(0.0) is None
    assert one.recall_at(51.0) is None
