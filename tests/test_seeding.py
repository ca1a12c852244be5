from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import DataError, RequestError
from streamgmm.frame import frame_of
from streamgmm.io.sources.array import ArraySource
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.concat import ConcatSource
from streamgmm.seeding import (
    INIT_METHODS,
    Start,
    _Points,
    draw_sample,
    first_mixture,
    kmeans_plus_plus,
    sample_size,
    uniform_rows,
)
from tests.oracles import COVARIANCE_TYPES, clustered


def seeded(x: np.ndarray, k: int, kind: str = "diag", method: str = "kmeans", start: Start | None = None, **changes):
    arguments = {"reg_covar": 1e-6, "seed": [0, 1], "workers": 1, **changes}
    return first_mixture(torch.from_numpy(x), frame_of(x, kind), k, kind, method, start or Start(), **arguments)


@given(st.integers(1, 10**12), st.data())
def test_sampled_rows_are_distinct_sorted_and_spread(n, data):
    count = data.draw(st.integers(1, min(n, 2000)))
    rows = uniform_rows(n, count, np.random.default_rng(0))
    assert len(rows) == count
    assert rows[0] >= 0
    assert rows[-1] < n
    assert (np.diff(rows) > 0).all()
    assert rows[0] < -(-n // count)


def test_every_row_is_as_likely():
    counts = np.zeros(103)
    for seed in range(3000):
        counts[uniform_rows(103, 10, np.random.default_rng(seed))] += 1
    assert np.abs(counts / 3000 - 10 / 103).max() < 0.03


@given(st.integers(1, 10**9), st.integers(1, 4096), st.integers(1, 65_536))
def test_sample_size_depends_on_shape_alone_and_has_rows_for_every_component(n, d, k):
    assert sample_size(n, d, k) == min(n, sample_size(10**10, d, k))
    assert sample_size(n, d, k) >= min(n, 16 * k)


def test_a_sample_of_the_size_asked_for():
    source = ArraySource(np.arange(2000.0)[:, None])
    assert len(draw_sample(source, 3, seed=0, size=777).rows) == 777
    assert len(draw_sample(source, 3, seed=0, size=10**9).rows) == 2000


def test_sample_comes_from_every_file():
    parts = [ArraySource(np.full((50_000, 2), i, np.float32), f"{i}.npy") for i in range(5)]
    drawn = draw_sample(ConcatSource(parts), 3, seed=0)
    sample, read = drawn.rows, drawn.rows_read
    assert set(np.unique(sample)) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert read >= len(sample)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("method", INIT_METHODS)
def test_every_method_gives_a_usable_mixture(kind, method):
    x = clustered(5000, 8, 5).astype(np.float32)
    mixture = seeded(x, 8, kind, method)
    assert np.isclose(mixture.weights.sum(), 1)
    assert np.isfinite(mixture.precisions_cholesky).all()
    assert mixture.digest == seeded(x, 8, kind, method).digest
    assert mixture.digest == seeded(x, 8, kind, method, workers=3).digest
    assert mixture.digest != seeded(x, 8, kind, method, seed=[0, 2]).digest


@pytest.mark.parametrize("method", ["kmeans", "k-means++"])
def test_separated_clusters_are_all_found(method):
    x = clustered(4000, 12, 4, spread=200.0).astype(np.float32)
    mixture = seeded(x, 12, method=method)
    true = np.array(sorted(np.random.default_rng(0).normal(size=(12, 4)).tolist())) * 200
    found = np.array(sorted(mixture.means.tolist()))
    assert np.abs(found - true).max() < 1.0
    assert mixture.covariances.max() < 2


@pytest.mark.parametrize("method", INIT_METHODS)
@pytest.mark.parametrize("x", [np.ones((40, 3), np.float32), np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)])
def test_duplicates_and_constant_data(method, x):
    mixture = seeded(x, 10, method=method)
    assert np.isfinite(mixture.means).all()
    assert (mixture.covariances > 0).all()


def test_as_many_components_as_rows():
    x = clustered(20, 3, 2)
    assert np.allclose(np.sort(seeded(x, 20).means, axis=0), np.sort(x, axis=0), atol=1e-5)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_given_parameters_are_taken_as_they_are(kind):
    x = clustered(500, 3, 4)
    rng = np.random.default_rng(1)
    root = rng.normal(size=(3, 4, 4))
    full = root @ root.transpose(0, 2, 1) + np.eye(4)
    precisions = {"full": full, "tied": full[0], "diag": full[:, range(4), range(4)], "spherical": full[:, 0, 0]}[kind]
    start = Start(np.array([0.2, 0.3, 0.5]), x[:3], precisions)
    mixture = seeded(x, 3, kind, start=start)
    assert np.array_equal(mixture.weights, start.weights)
    assert np.array_equal(mixture.means, x[:3])
    np.testing.assert_allclose(mixture.precisions, precisions, rtol=1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("left_out", ["weights", "means", "precisions"])
def test_what_is_not_given_is_found(kind, left_out):
    x = clustered(500, 3, 4)
    found = seeded(x, 3, kind)
    given = Start(found.weights[::-1].copy(), found.means + 0.5, 2 * found.precisions)
    mixture = seeded(x, 3, kind, start=replace(given, **{left_out: None}))
    for name in {"weights", "means", "precisions"} - {left_out}:
        np.testing.assert_allclose(getattr(mixture, name), getattr(given, name), rtol=1e-9)
    assert np.isfinite(getattr(mixture, left_out)).all()


def test_unknown_method_and_bad_rows_are_refused():
    with pytest.raises(RequestError, match=r"init must be one of kmeans.*got 'best'"):
        seeded(clustered(10, 2, 2), 2, method="best")
    x = clustered(100, 2, 2)
    x[17, 1] = np.nan
    with pytest.raises(DataError, match="row 17 of array: column 1 is nan"):
        draw_sample(ArraySource(x), 2, seed=0)


def test_rows_beside_the_sample_come_with_it_and_no_row_is_read_twice():
    x = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    beside = np.arange(100, 400)
    alone, drawn = draw_sample(ArraySource(x), 3, seed=0), draw_sample(ArraySource(x), 3, 0, None, beside)
    np.testing.assert_array_equal(drawn.rows, alone.rows)
    np.testing.assert_array_equal(drawn.rows, x[drawn.indices])
    np.testing.assert_array_equal(drawn.beside, x[beside])
    assert drawn.rows_read <= len(x)
    some = drawn.where(drawn.indices % 2 == 0)
    np.testing.assert_array_equal(some.rows, x[some.indices])


class InChunksOfFour(ArraySource):
    read_granule = 4
    gather = Source.gather


def test_a_last_chunk_counts_for_the_rows_that_it_has():
    source = InChunksOfFour(np.zeros((10, 1)))
    assert source.gather(np.array([1, 9]))[1] == 6
    assert source.gather(np.arange(10))[1] == 10


def test_larger_tiles_find_the_same_centres(monkeypatch):
    x = torch.from_numpy(clustered(10_000, 5, 12, spread=4.0).astype(np.float32))
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(0)) + 0.5
    small = kmeans_plus_plus(_Points(x, 2, weights), 12, np.random.default_rng(3))
    monkeypatch.setattr(_Points, "rows_at_once", lambda *_: len(x))
    assert torch.equal(kmeans_plus_plus(_Points(x, 2, weights), 12, np.random.default_rng(3)), small)
