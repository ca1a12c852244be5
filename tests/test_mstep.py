from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgmm.errors import NumericalError
from streamgmm.frame import frame_of
from streamgmm.kernels.reference import ReferenceKernel
from streamgmm.mixture import Mixture
from streamgmm.mstep import RELATIVE_FLOOR, m_step
from streamgmm.statistics import Statistics
from tests.oracles import COVARIANCE_TYPES, clustered, em_iteration, random_mixture


def statistics_of(x: np.ndarray, mixture: Mixture) -> Statistics:
    frame = frame_of(x, mixture.covariance_type)
    statistics = Statistics.zeros(mixture.covariance_type, mixture.n_components, torch.zeros(x.shape[1]))
    kernel = ReferenceKernel()
    kernel.accumulate(torch.from_numpy(x), kernel.parameters(mixture, frame, torch.device("cpu")), statistics)
    return frame.restore(statistics)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_is_exact_em(kind, offset):
    x = clustered(400, 3, 4) + offset
    mixture = random_mixture(kind, 3, 4)
    mixture = Mixture(mixture.weights, mixture.means + offset, mixture.covariances, kind)
    update = m_step(statistics_of(x, mixture), 1e-6, mixture)
    expected, _ = em_iteration(x, mixture, 1e-6)
    np.testing.assert_allclose(update.mixture.weights, expected.weights, rtol=1e-8)
    np.testing.assert_allclose(update.mixture.means, expected.means, rtol=1e-8)
    np.testing.assert_allclose(update.mixture.covariances, expected.covariances, rtol=1e-7, atol=1e-9)
    assert update.empty == ()
    assert update.degenerate == ()


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_an_empty_component_keeps_its_place_and_can_recover(kind):
    x = clustered(300, 2, 3)
    start = random_mixture(kind, 3, 3)
    means = start.means.copy()
    means[1] = 1e6  # so far away that every responsibility underflows
    start = Mixture(start.weights, means, start.covariances, kind)
    update = m_step(statistics_of(x, start), 1e-6, start)
    assert update.empty == (1,)
    assert np.array_equal(update.mixture.means[1], means[1])
    assert 0 < update.mixture.weights[1] < 1e-8
    assert np.isclose(update.mixture.weights.sum(), 1.0)
    if kind != "tied":
        assert np.array_equal(update.mixture.covariances[1], start.covariances[1])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_degenerate_components_are_floored_and_reported(kind):
    x = np.concatenate([np.zeros((50, 3)), clustered(50, 1, 3)])
    start = random_mixture(kind, 2, 3)
    sharp = {"full": 1e-3 * np.eye(3), "diag": np.full(3, 1e-3), "spherical": 1e-3}
    if kind == "tied":
        x = np.concatenate([np.zeros((50, 3)), np.ones((50, 3)) * 100])
        means, covariances = np.array([[0.0] * 3, [100.0] * 3]), np.eye(3)
    else:
        means = np.array([[0.0] * 3, x[50:].mean(0)])
        covariances = np.stack([sharp[kind] * 1e-6, sharp[kind] * 1e3])
    start = Mixture(np.array([0.5, 0.5]), means, covariances, kind)
    statistics = statistics_of(x, start)
    update = m_step(statistics, 0.0, start)
    assert 0 in update.degenerate
    assert np.isfinite(update.mixture.precisions_cholesky).all()
    regularised = m_step(statistics, 1e-3, start)
    assert regularised.degenerate == ()


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_equal_rows_without_regularisation(kind):
    x = np.full((20, 3), 3.0)
    start = random_mixture(kind, 2, 3)
    start = Mixture(start.weights, x[:2] + np.array([[0.0], [0.5]]), start.covariances, kind)
    update = m_step(statistics_of(x, start), 0.0, start)
    np.testing.assert_allclose(update.mixture.means, 3.0, atol=1e-12)
    assert np.isfinite(update.mixture.precisions_cholesky).all()
    assert update.mixture.covariances.max() <= 2 * RELATIVE_FLOOR


def test_overflowed_statistics_are_an_error():
    statistics = Statistics.zeros("diag", 2, torch.zeros(3))
    statistics.scatter.fill_(float("inf"))
    with pytest.raises(NumericalError, match="overflowed"):
        m_step(statistics, 1e-6, random_mixture("diag", 2, 3))
