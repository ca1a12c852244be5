"""Draws against the mixture they are from, and against themselves."""

from __future__ import annotations

import numpy as np
import pytest

from streamgmm import sampling
from streamgmm.errors import RequestError
from streamgmm.mixture import Mixture
from streamgmm.sampling import draw, piece_rows
from tests.oracles import COVARIANCE_TYPES, dense_covariances, random_mixture

K, D = 5, 4


@pytest.fixture(params=COVARIANCE_TYPES)
def mixture(request: pytest.FixtureRequest) -> Mixture:
    return random_mixture(request.param, K, D)


def drawn(mixture: Mixture, n: int, seed: int = 0, workers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    pieces = list(draw(mixture, n, seed, workers))
    rows, labels = (np.concatenate([piece[i] for piece in pieces]) for i in range(2))
    return rows, labels


def test_rows_have_the_moments_of_their_components(mixture):
    x, labels = drawn(mixture, 150_001)
    assert (x.shape, x.dtype, labels.dtype) == ((150_001, D), np.float64, np.int32)
    counts = np.bincount(labels, minlength=K)
    # Five standard deviations of a binomial.
    deviation = np.sqrt(len(x) * mixture.weights * (1 - mixture.weights))
    assert (np.abs(counts - len(x) * mixture.weights) < 5 * deviation).all()
    dense = dense_covariances(mixture)
    for k in range(K):
        own = x[labels == k]
        error = np.sqrt(np.diag(dense[k]) / len(own))
        assert (np.abs(own.mean(0) - mixture.means[k]) < 5 * error).all()
        spread = np.sqrt((np.outer(np.diag(dense[k]), np.diag(dense[k])) + dense[k] ** 2) / len(own))
        assert (np.abs(np.cov(own.T) - dense[k]) < 5 * spread).all()


def test_components_come_in_random_order(mixture):
    _, labels = drawn(mixture, 65_536)
    # In independent draws neighbours agree as often as two draws do.
    chance = (mixture.weights**2).sum()
    agreeing = (labels[1:] == labels[:-1]).mean()
    assert abs(agreeing - chance) < 5 * np.sqrt(chance * (1 - chance) / len(labels)) * 2
    first, second = (np.bincount(half, minlength=K) for half in np.split(labels, 2))
    assert (np.abs(first - second) < 5 * np.sqrt(2 * 32_768 * mixture.weights)).all()


def test_pieces_have_streams_of_their_own():
    x, _ = drawn(random_mixture("diag", 1, 2), 3 * 65_536)
    noise = (x - x.mean(0)) / x.std(0)
    first, second, third = np.split(noise, 3)
    for other in (second, third):
        assert np.abs((first * other).mean()) < 5 / np.sqrt(2 * 65_536)


def test_neither_workers_nor_the_number_of_rows_change_a_row(mixture, monkeypatch):
    monkeypatch.setattr(sampling, "_PIECE_VALUES", 1000 * D)
    reference = drawn(mixture, 5000, 3, 1)
    for workers in (2, 3):
        for expected, found in zip(reference, drawn(mixture, 5000, 3, workers), strict=True):
            assert found.tobytes() == expected.tobytes()
    # Products of other shapes may round differently in the last place.
    x, labels = drawn(mixture, 1234, 3)
    np.testing.assert_allclose(x, reference[0][:1234], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(labels, reference[1][:1234])
    assert not np.array_equal(drawn(mixture, 1234, 4)[1], labels)


@pytest.mark.parametrize(
    ("d", "rows"), [(1, 65_536), (64, 65_536), (65, 32_768), (128, 32_768), (4096, 1024), (10**7, 1)]
)
def test_a_piece_is_bounded(d, rows):
    assert piece_rows(d) == rows


def test_a_component_of_weight_zero_is_never_drawn():
    for weights in ([0, 0.3, 0, 0.7, 0], [1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]):
        given = random_mixture("spherical", K, D)
        mixture = Mixture(np.array(weights), given.means, given.covariances, "spherical")
        assert set(drawn(mixture, 10_000)[1]) == set(np.flatnonzero(weights))


def test_zero_variance_repeats_the_means():
    mixture = Mixture(np.full(2, 0.5), np.arange(4.0).reshape(2, 2), np.zeros((2, 2)), "diag")
    x, labels = drawn(mixture, 100)
    np.testing.assert_array_equal(x, mixture.means[labels])


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_what_is_no_covariance_is_refused(kind):
    given = random_mixture(kind, 2, 3)
    with pytest.raises(RequestError, match="positive definite; raise reg_covar"):
        drawn(Mixture(given.weights, given.means, -given.covariances, kind), 5)
    with pytest.raises(RequestError, match="must not be negative; raise reg_covar"):
        drawn(Mixture(given.weights, given.means, -np.ones(2), "spherical"), 5)


def test_impossible_requests_are_named(mixture):
    with pytest.raises(RequestError, match="n_samples must be at least 1; got 0"):
        drawn(mixture, 0)
    with pytest.raises(RequestError, match="seed must be at least 0; got -1"):
        drawn(mixture, 1, -1)
