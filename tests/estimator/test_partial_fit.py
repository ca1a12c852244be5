"""Stepwise EM, against the recursion with its statistics written down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from streamgmm import GaussianMixture, Mixture
from streamgmm.errors import DataError
from tests.oracles import COVARIANCE_TYPES, clustered, log_joint

REG = 1e-3


def mean_statistics(x, mixture, weights):
    resp = softmax(log_joint(x, mixture), axis=1) * (weights / weights.sum())[:, None]
    outer = np.einsum("nk,ni,nj->kij", resp, x, x)
    return resp.sum(0), resp.T @ x, outer


def from_statistics(statistics, kind):
    counts, sums, outer = statistics
    means = sums / counts[:, None]
    full = outer / counts[:, None, None] - np.einsum("ki,kj->kij", means, means)
    diagonal = np.diagonal(full, axis1=1, axis2=2)
    covariances = {
        "full": full + REG * np.eye(full.shape[-1]),
        "tied": np.einsum("k,kij->ij", counts, full) + REG * np.eye(full.shape[-1]),
        "diag": diagonal + REG,
        "spherical": diagonal.mean(1) + REG,
    }[kind]
    return Mixture(counts / counts.sum(), means, covariances, kind)


def recursion(batches, weights, start, kind):
    """s ← (1 − γ)s + γŝ with γ = (t + 2)^−0.6 after t updates, and s = ŝ at first."""
    kept, mixture = None, start
    for t, (x, w) in enumerate(zip(batches, weights, strict=True)):
        new = mean_statistics(x, mixture, w)
        gamma = (t + 2) ** -0.6
        kept = new if kept is None else tuple((1 - gamma) * a + gamma * b for a, b in zip(kept, new, strict=True))
        mixture = from_statistics(kept, kind)
    return mixture


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_is_the_recursion(kind, weighted):
    x = clustered(600, 3, 4, spread=2.0)
    rng = np.random.default_rng(1)
    batches = np.split(x, [150, 157, 400])
    weights = [rng.random(len(b)) * 1e3 if weighted else np.ones(len(b)) for b in batches]
    common = {"covariance_type": kind, "reg_covar": REG, "random_state": 0}
    given = GaussianMixture(3, max_iter=0, **common).fit(x)
    start = {"weights_init": given.weights_, "means_init": given.means_, "precisions_init": given.precisions_}
    estimator = GaussianMixture(3, **common, **start)
    for batch, own in zip(batches, weights, strict=True):
        estimator.partial_fit(batch, sample_weight=own if weighted else None)
    expected = recursion(batches, weights, given.mixture_, kind)
    np.testing.assert_allclose(estimator.weights_, expected.weights, rtol=1e-8)
    np.testing.assert_allclose(estimator.means_, expected.means, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(estimator.covariances_, expected.covariances, rtol=1e-7, atol=1e-9)
    assert estimator.n_iter_ == len(estimator.lower_bounds_) == 4
    assert not estimator.converged_


def test_the_first_batch_is_an_em_step_from_its_own_seeds():
    x = clustered(300, 3, 4)
    common = {"covariance_type": "diag", "random_state": 0, "tol": 0}
    first = GaussianMixture(3, **common).partial_fit(x)
    with pytest.warns(UserWarning, match="did not converge"):
        one = GaussianMixture(3, max_iter=1, **common).fit(x)
    np.testing.assert_allclose(first.means_, one.means_, rtol=1e-9)
    np.testing.assert_allclose(first.lower_bound_, one.lower_bound_, rtol=1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_learns_what_a_fit_learns(kind, dtype):
    x = clustered(12_000, 4, 3, spread=20.0).astype(dtype)
    whole = GaussianMixture(4, covariance_type=kind, random_state=0).fit(x)
    stepwise = GaussianMixture(4, covariance_type=kind, random_state=0)
    for batch in np.split(x, 24):
        stepwise.partial_fit(batch)
    assert stepwise.means_.dtype == dtype
    assert abs(stepwise.score(x) - whole.score(x)) < 0.02


def test_goes_on_from_a_fit_and_from_a_file(tmp_path):
    x = clustered(2000, 3, 4, spread=4.0)
    fitted = GaussianMixture(3, random_state=0).fit(x)
    before, score = fitted.n_iter_, fitted.score(x)
    fitted.save(tmp_path / "model")
    loaded = GaussianMixture.load(tmp_path / "model")
    for estimator in (fitted, loaded):
        estimator.partial_fit(x[:500])
        assert estimator.n_iter_ == before + 1
        assert abs(estimator.score(x) - score) < 0.05
    np.testing.assert_allclose(fitted.means_, loaded.means_, rtol=1e-9)


@given(st.integers(1, 7), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_any_batch_size_after_the_first(n_components, rows):
    x = clustered(200, 3, 2)
    estimator = GaussianMixture(n_components, covariance_type="full", random_state=0, reg_covar=1e-3)
    estimator.partial_fit(x[:50])
    for start in range(50, 50 + 3 * rows, rows):
        estimator.partial_fit(x[start : start + rows])
    assert np.isfinite(estimator.score_samples(x)).all()
    assert np.isclose(estimator.weights_.sum(), 1)


def test_streams_a_batch_larger_than_a_block(tmp_path):
    x = clustered(70_000, 3, 2).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    common = {"random_state": 0, "covariance_type": "diag"}
    a = GaussianMixture(3, **common).partial_fit(tmp_path / "x.npy")
    b = GaussianMixture(3, **common).partial_fit(x)
    assert a.mixture_.digest == b.mixture_.digest


def test_a_constant_batch_and_an_outlier_stay_finite():
    x = clustered(300, 3, 2)
    estimator = GaussianMixture(3, random_state=0).partial_fit(x)
    estimator.partial_fit(np.zeros((40, 2))).partial_fit([[1e12, -1e12]])
    assert np.isfinite(estimator.score_samples(x)).all()
    with pytest.raises(ValueError, match="Input X contains NaN"):
        estimator.partial_fit([[np.nan, 0.0]])
    with pytest.raises(DataError, match="column 1 is inf"):
        estimator.partial_fit(iter([[[0.0, np.inf]]]))
