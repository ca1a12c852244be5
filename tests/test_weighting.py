"""What each row counts, and how it reaches the sums."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.errors import DataError, NumericalError, RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start
from streamgmm.weighting import Weighting, open_weights, power_of_two_near, without_nonfinite
from tests.oracles import COVARIANCE_TYPES, clustered

ROWS = clustered(20_011, 3, 4, spread=1.5).astype(np.float32)
START = Start(means=ROWS[[5, 4000, 11_000, 19_000]].astype(np.float64))


def fitted(rows: np.ndarray, weights: object = None, **changes: object) -> FitResult:
    given = None if weights is None else open_weights(weights, len(rows))
    request = {
        "covariance_type": "diag",
        "max_iter": 3,
        "tol": 0.0,
        "device": "cpu",
        "start": START,
        "precision": "highest",
        **changes,
    }
    return fit(ArraySource(rows), FitRequest(4, weights=given, **request))


def assert_close(one: FitResult, other: FitResult, rtol: float = 1e-9) -> None:
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(one.mixture, name), getattr(other.mixture, name), rtol=rtol, atol=1e-10)
    np.testing.assert_allclose(one.lower_bounds, other.lower_bounds, rtol=rtol)


@pytest.fixture(scope="module")
def fixed_start() -> Start:
    """Every parameter given, so that nothing depends on which rows are sampled."""
    mixture = fitted(ROWS, max_iter=0).mixture
    return Start(mixture.weights, mixture.means, 1 / mixture.covariances)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_whole_weights_are_repeated_rows_and_zero_removes_them(kind):
    repeats = np.random.default_rng(0).integers(0, 4, size=len(ROWS))
    d, k = ROWS.shape[1], 4
    precisions = {
        "full": np.broadcast_to(np.eye(d), (k, d, d)),
        "tied": np.eye(d),
        "diag": np.ones((k, d)),
        "spherical": np.ones(k),
    }[kind]
    start = Start(np.full(k, 1 / k), START.means, precisions)
    one = fitted(ROWS, repeats, covariance_type=kind, start=start)
    assert_close(one, fitted(np.repeat(ROWS, repeats, axis=0), covariance_type=kind, start=start))
    assert one.model.n_rows == repeats.sum()


def test_equal_weights_of_any_size_change_nothing_but_the_number_of_rows(fixed_start):
    plain = fitted(ROWS, start=fixed_start)
    heavy = fitted(ROWS, np.full(len(ROWS), 3e9), start=fixed_start)
    assert_close(heavy, plain)
    assert heavy.model.n_rows == pytest.approx(3e9 * len(ROWS))


@given(chunk_rows=st.integers(1, 70_000), threads=st.sampled_from([1, 3]))
@settings(max_examples=8, deadline=None)
def test_chunks_change_no_bit_of_a_weighted_fit_with_held_out_and_skipped_rows(chunk_rows, threads):
    rows = np.concatenate([ROWS] * 4)
    rows[[7, 30_000, 79_000], [0, 1, 2]] = [np.nan, np.inf, -np.inf]
    weights = np.random.default_rng(1).random(len(rows))
    wishes = {"holdout": 0.1, "nonfinite": "skip", "init": "k-means++", "start": Start(), "precision": "auto"}
    results = [
        fitted(rows, weights, **wishes, chunk_rows=size, threads=count)
        for size, count in ((None, 2), (chunk_rows, threads))
    ]
    assert results[0].mixture.digest == results[1].mixture.digest
    assert results[0].model.evaluation == results[1].model.evaluation
    assert [result.skipped for result in results] == [3, 3]


def test_skipped_rows_are_as_if_they_were_not_there(fixed_start):
    bad = ROWS.copy()
    bad[[0, 10_000, 20_010], [2, 0, 1]] = [np.nan, np.inf, -np.inf]
    kept = np.isfinite(bad).all(axis=1)
    result = fitted(bad, nonfinite="skip", start=fixed_start)
    assert_close(result, fitted(ROWS[kept], start=fixed_start))
    assert result.skipped == 3
    assert {record["skipped"] for record in result.history} == {3}
    with pytest.raises(DataError, match=r"row 0 of array: column 2 is nan"):
        fitted(bad, start=fixed_start)


def test_float64_rows_that_only_float64_holds_are_not_skipped(fixed_start):
    rows = np.full((3, 2), 1e300)
    same, _, skipped = without_nonfinite(torch.from_numpy(rows), None, torch.zeros(2))
    assert skipped == 0
    assert same.numpy() is not None
    assert (same.numpy() == rows).all()


def test_bytes_are_always_finite():
    rows = torch.zeros((3, 2), dtype=torch.uint8)
    assert without_nonfinite(rows, None, torch.zeros(2)) == (rows, None, 0)


def test_the_rows_held_out_are_a_fixed_random_share(fixed_start):
    weighting = Weighting(holdout=0.25, seed=3)
    held = weighting.held_out(np.arange(1_000_000))
    assert abs(held.mean() - 0.25) < 0.002
    # Pieces agree with the whole, other seeds with nothing, and neighbours are independent.
    assert (weighting.held_out(np.arange(777, 999_999)) == held[777:999_999]).all()
    other = Weighting(holdout=0.25, seed=4).held_out(np.arange(1_000_000))
    assert abs((held & other).mean() - 0.0625) < 0.002
    assert abs((held[1:] & held[:-1]).mean() - 0.0625) < 0.002
    result = fitted(ROWS, holdout=0.25, seed=3, start=fixed_start)
    mask = weighting.held_out(np.arange(len(ROWS)))
    alone = fitted(ROWS[~mask], start=fixed_start)
    assert_close(result, alone)
    assert result.model.n_rows == (~mask).sum()


def test_weights_that_make_no_sense_are_named(tmp_path: Path):
    weights = np.ones(len(ROWS))
    for bad in (-1.0, np.nan, np.inf):
        weights[12_345] = bad
        with pytest.raises(DataError, match=rf"sample_weight: row 12345 of array is {bad}"):
            fitted(ROWS, weights, init="k-means++", start=Start())
    with pytest.raises(RequestError, match=r"shape \(20011,\); got \(5,\)"):
        fitted(ROWS, np.ones(5))
    with pytest.raises((DataError, NumericalError), match="sampled rows count"):
        fitted(ROWS, np.zeros(len(ROWS)))
    np.save(tmp_path / "w.npy", np.ones(len(ROWS), dtype=np.int64))
    from_file = fitted(ROWS, tmp_path / "w.npy")
    assert from_file.mixture.digest == fitted(ROWS, np.ones((len(ROWS), 1))).mixture.digest
    assert json.dumps(from_file.summary())


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_scaled_weights_are_near_one(weights):
    scale = power_of_two_near(np.array(weights))
    assert np.log2(scale) % 1 == 0
    assert 0.5 <= np.mean(weights) * scale <= 2
