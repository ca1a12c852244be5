"""The test of the order of rows: silent on random ones, loud on sorted, drifting and locally alike ones."""

from __future__ import annotations

import numpy as np
import pytest

from streamgmm.exchangeability import design_effect, limit, runs
from streamgmm.seeding import uniform_rows

N, D = 160_000, 8


def effects(x: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Of evenly drawn rows, and of short runs."""
    rng = np.random.default_rng(seed)
    drawn, short = uniform_rows(len(x), 32_768, rng), runs(*x.shape, rng)
    return design_effect(x[drawn], drawn, len(x)), design_effect(x[short], short, len(x))


@pytest.mark.parametrize("kind", ["normal", "heavy", "rare", "clusters"])
def test_rows_in_random_order_pass(kind):
    rng = np.random.default_rng(1)
    x = {
        "normal": lambda: rng.normal(size=(N, D)),
        "heavy": lambda: rng.standard_t(1.5, size=(N, D)),
        "rare": lambda: (rng.random((N, D)) < 0.01).astype(np.uint8),
        "clusters": lambda: (10 * rng.normal(size=(20, D)))[rng.integers(20, size=N)],
    }[kind]()
    assert max(effects(x)) < limit(D)


def test_sorted_rows_and_drift_do_not():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, D))
    sorted_rows = x[np.argsort(x[:, 3])]
    assert effects(sorted_rows)[0] > 10 * limit(D)
    drifting = x + 0.3 * np.linspace(-1, 1, N)[:, None] * (np.arange(D) == 2)
    assert effects(drifting)[0] > limit(D)


def test_what_neighbours_share_is_seen_by_runs_alone():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, D)) + rng.normal(size=(N // 40, D)).repeat(40, axis=0)
    evenly, short = effects(x)
    assert short > 3 * limit(D)
    assert evenly < 3 * limit(D)


def test_rows_that_say_nothing():
    indices = np.arange(1000)
    assert design_effect(np.ones((1000, 2)), indices, 1000) == 0.0
    assert design_effect(np.full((1000, 2), np.nan), indices, 1000) == 0.0
    x = np.random.default_rng(0).normal(size=(1000, 2))
    x[::7] = np.inf
    assert 0.0 < design_effect(x, indices, 1000) < limit(2)
    assert design_effect(x[:0], indices[:0], 1000) == 0.0


@pytest.mark.parametrize(("n", "d"), [(1, 1), (37, 2), (1000, 4096), (10**7, 16)])
def test_runs_are_distinct_rows_in_order(n, d):
    rows = runs(n, d, np.random.default_rng(0))
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < n
    assert len(rows) <= 200 * 256
