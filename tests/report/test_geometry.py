"""Spectra and projections against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.mixture import Mixture
from streamgmm.report import geometry
from streamgmm.report.geometry import principal_plane, spectra
from tests.oracles import COVARIANCE_TYPES, dense_covariances, random_mixture


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 7), (5, 2), (13, 63)])
def test_condition_numbers_are_numpy_s(kind, k, d):
    mixture = random_mixture(kind, k, d)
    found = spectra(mixture)
    expected = np.linalg.cond(dense_covariances(mixture))[found.components]
    np.testing.assert_allclose(found.condition_numbers, expected, rtol=1e-6)
    assert len(found.components) == (1 if kind == "tied" else k)
    assert (np.diff(mixture.weights[found.components]) <= 0).all()


def test_a_flat_covariance_has_an_infinite_condition_number():
    mixture = Mixture(np.full(2, 0.5), np.zeros((2, 2)), np.array([[1.0, 0.0], [1.0, 4.0]]), "diag")
    assert sorted(spectra(mixture).condition_numbers) == [4.0, np.inf]


def test_only_the_heaviest_where_all_would_take_too_long(monkeypatch):
    monkeypatch.setattr(geometry, "_EIGEN_BUDGET", 3 * 4**3)
    mixture = random_mixture("full", 9, 4)
    assert set(spectra(mixture).components) == set(np.argsort(mixture.weights)[-3:])
    monkeypatch.setattr(geometry, "_EIGEN_BUDGET", 1)
    assert len(spectra(mixture).components) == 1


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(k=st.integers(1, 12), d=st.integers(2, 20), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_plane_is_that_of_weighted_pca(kind, k, d, seed):
    mixture = random_mixture(kind, k, d, seed)
    plane = principal_plane(mixture)
    centred = mixture.means - mixture.weights @ mixture.means
    scatter = (mixture.weights[:, None] * centred).T @ centred
    eigenvalues, vectors = np.linalg.eigh(scatter)
    told = min(2, k - 1)
    for i in range(told):
        axis = vectors[:, -1 - i]
        np.testing.assert_allclose(np.abs(plane.means[:, i]), np.abs(centred @ axis), atol=1e-5)
        np.testing.assert_allclose(plane.covariances[:, i, i], axis @ dense_covariances(mixture) @ axis, rtol=1e-4)
        assert plane.share[i] == pytest.approx(eigenvalues[-1 - i] / scatter.trace(), rel=1e-6)
    assert np.isnan(plane.share[told:]).all()
    assert (np.linalg.eigvalsh(plane.covariances) > 0).all()


@pytest.mark.parametrize("kind", ["full", "tied", "diag"])
def test_one_component_is_seen_where_it_is_widest(kind):
    variances = np.array([1.0, 9.0, 4.0, 0.1])
    covariances = {"full": np.diag(variances)[None], "tied": np.diag(variances), "diag": variances[None]}[kind]
    plane = principal_plane(Mixture(np.ones(1), np.full((1, 4), 5.0), covariances, kind))
    np.testing.assert_allclose(plane.means, 0, atol=1e-12)
    np.testing.assert_allclose(plane.covariances[0], np.diag([9.0, 4.0]), atol=1e-9)


def test_equal_means_and_no_variance_at_all():
    plane = principal_plane(Mixture(np.full(3, 1 / 3), np.full((3, 2), 1e9), np.zeros((3, 2)), "diag"))
    assert np.isfinite(plane.means).all()
    np.testing.assert_array_equal(plane.covariances, 0)
