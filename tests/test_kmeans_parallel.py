"""Seeds drawn from every row: by distance and weight, the same for any chunks and ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm import starting
from streamgmm.distributed import ALONE, World
from streamgmm.errors import DataError, RequestError
from streamgmm.fitting import assist, fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.kmeans_parallel import ROUNDS, Candidates, Drawn, candidates, n_candidates
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.weighting import Weighting, uniform_of
from tests.oracles import clustered
from tests.worlds import run_world

ROWS = clustered(140_001, 12, 4, spread=6.0).astype(np.float32)  # three blocks, the last one short


def request(k: int = 12, **changes: object) -> FitRequest:
    return FitRequest(
        k, **{"covariance_type": "diag", "init": "k-means||", "tol": 0.0, "device": "cpu", "max_iter": 1, **changes}
    )


@pytest.fixture
def seen(monkeypatch) -> list[Candidates]:
    """What candidates the leaders of fits found."""
    found: list[Candidates] = []

    def watched(*arguments: object) -> Candidates | None:
        drawn = candidates(*arguments)
        found.extend([] if drawn is None else [drawn])
        return drawn

    monkeypatch.setattr(starting, "candidates", watched)
    return found


@given(
    st.lists(st.one_of(st.just(np.inf), st.integers(0, 9).map(float)), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 7),
)
@settings(max_examples=100, deadline=None)
def test_the_rows_drawn_are_those_with_the_smallest_keys_however_they_come(keys, size, piece):
    keys, numbers = np.array(keys), np.arange(len(keys))
    drawn = Drawn.nothing(size, 1)
    for start in range(0, len(keys), piece):
        part = slice(start, start + piece)
        kept = keys[part] <= drawn.limit
        drawn = drawn.merged(keys[part][kept], numbers[part][kept], numbers[part][kept, None].astype(float))
    expected = sorted(sorted((key, row) for row, key in enumerate(keys) if np.isfinite(key))[:size], key=lambda p: p[1])
    assert drawn.numbers.tolist() == [row for _, row in expected]
    assert drawn.rows.ravel().tolist() == drawn.numbers.tolist()


def test_numbers_of_rows_are_uniform_and_differ_by_seed():
    one, other = (np.sort(uniform_of(np.arange(100_000), [7, i])) for i in (0, 1))
    even = (np.arange(100_000) + 0.5) / 100_000
    # Kolmogorov's bound for a probability of 1e-6.
    assert np.abs(one - even).max() < 2.7 / np.sqrt(100_000)
    assert np.abs(other - even).max() < 2.7 / np.sqrt(100_000)
    assert (one != other).any()


def test_rows_are_drawn_in_proportion_to_their_squared_distance(monkeypatch, seen):
    monkeypatch.setattr("streamgmm.kmeans_parallel.ROUNDS", 1)
    # One row in a hundred lies three times as far from the rest as those do from one another: it has half of the odds.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70_000, 1)).astype(np.float32)
    x[::100] *= 10
    fit(ArraySource(x), request(200, max_iter=0, sample_rows=1000))
    found = seen[0].rows[1 + 1 :]
    far = np.isin(found, x[::100].astype(np.float64)).mean()
    assert 0.2 < far < 0.6


def test_every_row_is_counted_once_and_read_four_times(seen):
    result = fit(ArraySource(ROWS), request())
    assert seen[0].counts.sum() == len(ROWS)
    assert len(seen[0].rows) <= n_candidates(12)
    distances = ((ROWS[:, None].astype(np.float64) - seen[0].rows[None]) ** 2).sum(-1)
    np.testing.assert_allclose(seen[0].counts, np.bincount(distances.argmin(1), minlength=len(seen[0].rows)), atol=2)
    assert ROUNDS + 2 < result.n_passes <= ROUNDS + 3


def test_every_cluster_is_found():
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(40, 4)) * 20
    x = (centres[rng.integers(40, size=70_000)] + rng.normal(size=(70_000, 4))).astype(np.float32)
    result = fit(ArraySource(x), request(40, model="kmeans", covariance_type="spherical"))
    distances = ((centres[:, None] - result.mixture.means) ** 2).sum(-1)
    assert distances.min(1).max() < 1.0


def work(source: ArraySource, asked: FitRequest) -> Callable[[World], FitResult | None]:
    def one(world: World) -> FitResult | None:
        return (fit if world.leads else assist)(source, asked, world=world)

    return one


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_threads_and_processes_change_no_bit(size, weighted):
    weights = ArraySource(np.random.default_rng(0).uniform(0, 3, size=(len(ROWS), 1))) if weighted else None
    source = ArraySource(ROWS)
    whole = fit(source, request(weights=weights))
    other = request(weights=weights, chunk_rows=1024 * size, threads=2, memory_limit=256 << 20)
    result = run_world(size, work(source, other))[0] if size > 1 else work(source, other)(ALONE)
    assert isinstance(result, FitResult), result
    assert result.mixture.digest == whole.mixture.digest
    assert result.n_passes == whole.n_passes


def test_rows_that_do_not_count_are_not_drawn(seen):
    x = ROWS[:70_000].copy()
    weights = np.ones((len(x), 1))
    weights[::2] = 0
    x[::2] += 1000
    x[1::1000] = np.nan
    fit(ArraySource(x), request(weights=ArraySource(weights), holdout=0.3, nonfinite="skip", seed=5))
    held = Weighting(holdout=0.3, seed=5).held_out(np.arange(len(x)))
    counted = (weights[:, 0] > 0) & ~held & np.isfinite(x).all(1)
    allowed = {row.tobytes() for row in x[counted].astype(np.float64)}
    assert all(row.tobytes() in allowed for row in seen[0].rows)
    assert seen[0].counts.sum() == counted.sum()
    with pytest.raises(DataError, match="column 0 is nan"):
        fit(ArraySource(x), request())


def test_a_row_that_is_not_finite_and_not_sampled_is_named():
    x = ROWS[:70_000].copy()
    x[54_321, 2] = np.inf
    with pytest.raises(DataError, match=r"row 54321.*column 2 is inf"):
        fit(ArraySource(x), request(sample_rows=100))


def test_sizes_and_starts_choose_among_the_same_candidates(seen):
    several = fit(ArraySource(ROWS), request((5, 12)))
    assert len(seen) == 1
    assert [model.mixture.n_components for model in several.models] == [5, 12]
    assert several.models[1].mixture.digest == fit(ArraySource(ROWS), request()).mixture.digest
    assert fit(ArraySource(ROWS), request(n_init=2)).n_passes <= ROUNDS + 3


def test_few_and_equal_rows_will_do():
    assert fit(ArraySource(np.ones((30, 2), np.float32)), request(3)).mixture.n_components == 3
    assert fit(ArraySource(ROWS[:5]), request(5)).mixture.n_components == 5


def test_a_resumed_run_draws_nothing(tmp_path, seen):
    fit(ArraySource(ROWS), request(), tmp_path / "run")
    more = fit(ArraySource(ROWS), request(max_iter=2), tmp_path / "run")
    assert len(seen) == 1
    assert more.mixture.digest == fit(ArraySource(ROWS), request(max_iter=2)).mixture.digest
    assert more.n_passes <= ROUNDS + 4


def test_growing_needs_no_seeds_from_every_row():
    with pytest.raises(RequestError, match=r"init='k-means\|\|' reads too much"):
        fit(ArraySource(ROWS), request(algorithm="stepwise"))
    chosen = fit(ArraySource(ROWS), request(algorithm="auto"))
    assert chosen.algorithm == "em"
    assert "k-means||" in chosen.why
