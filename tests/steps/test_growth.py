"""Splitting where two components fit better than one, and growing a mixture that way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgmm.frame import frame_of
from streamgmm.mixture import Mixture, covariance_shape
from streamgmm.seeding import Start, first_mixture
from streamgmm.steps.gain import split, split_best
from streamgmm.steps.growth import SampleEM, first_size, grown
from tests.oracles import COVARIANCE_TYPES, clustered, log_joint


def mixture_of(x: np.ndarray, kind: str, labels: np.ndarray) -> Mixture:
    """One EM update from a hard assignment, by NumPy."""
    k, d = labels.max() + 1, x.shape[1]
    means = np.stack([x[labels == c].mean(0) for c in range(k)])
    full = np.stack([np.cov(x[labels == c].T, bias=True) + 1e-6 * np.eye(d) for c in range(k)])
    weights = np.bincount(labels) / len(x)
    covariances = {
        "full": full,
        "tied": np.einsum("k,kij->ij", weights, full),
        "diag": np.diagonal(full, 0, 1, 2).copy(),
        "spherical": np.diagonal(full, 0, 1, 2).mean(1),
    }[kind]
    return Mixture(weights, means, covariances, kind)


def likelihood(x: np.ndarray, mixture: Mixture) -> float:
    return float(np.logaddexp.reduce(log_joint(x, mixture), axis=1).mean())


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_the_component_that_is_two_is_split(kind):
    rng = np.random.default_rng(0)
    blobs = [rng.normal(size=(400, 3)) + centre for centre in ([0, 0, 0], [20, 0, 0], [20, 8, 0], [0, 0, 30])]
    x, labels = np.concatenate(blobs), np.repeat([0, 1, 1, 2], 400)
    before = mixture_of(x, kind, labels)
    after = split_best(before, x, np.ones(len(x)), labels, 1, [0], workers=2)
    assert after.n_components == 4
    np.testing.assert_array_equal(after.means[[0, 2]], before.means[[0, 2]])
    found = after.means[[1, 3]]
    np.testing.assert_allclose(found[found[:, 1].argsort()], [[20, 0, 0], [20, 8, 0]], atol=0.5)
    assert after.weights.sum() == pytest.approx(1.0)
    assert after.covariances.shape == covariance_shape(kind, 4, 3)
    if kind != "tied":  # whose one covariance has yet to follow
        assert likelihood(x, after) > likelihood(x, before) + 0.1


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_component_without_rows_can_be_split_all_the_same(kind):
    x = clustered(50, 2, 3)
    before = mixture_of(x, kind, np.arange(50) % 2)
    labels = np.zeros(50, dtype=np.int64)
    after = split_best(before, x, np.ones(50), labels, 2, [0], workers=1)
    assert after.n_components == 4
    assert np.isfinite(after.means).all()
    assert split(before, 1, x[:0], np.ones(0), np.ones(3)).gain == -np.inf


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_weights_count_as_repetition_does(kind):
    x = clustered(300, 2, 3, spread=2.0)
    mixture, axis = mixture_of(x, kind, np.zeros(300, dtype=np.int64)), np.ones(3)
    twice = split(mixture, 0, np.concatenate([x, x]), np.ones(600), axis)
    weighted = split(mixture, 0, x, np.full(300, 2.0), axis)
    assert twice.gain == pytest.approx(weighted.gain)
    np.testing.assert_allclose(twice.means, weighted.means)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_growth_finds_a_better_optimum_than_k_means(kind):
    x = clustered(6000, 24, 4, spread=3.0).astype(np.float32)
    rows, frame = torch.from_numpy(x), frame_of(x, kind)

    def seeded(k: int) -> Mixture:
        return first_mixture(rows, frame_of(x, "spherical"), k, kind, "kmeans", Start(), 1e-6, [0, 1], 2)

    def em(workers: int, chunk_rows: int) -> SampleEM:
        return SampleEM(rows, None, rows[:500], frame, "auto", 1e-6, chunk_rows, workers)

    one, other = (
        grown(seeded(first_size(24)), 24, each, x, np.ones(len(x)), [0, 4]) for each in (em(1, 4096), em(3, 8192))
    )
    assert one.digest == other.digest
    assert one.n_components == 24
    assert likelihood(x, one) > likelihood(x, em(2, 4096).iterate(seeded(24), 30)) - 0.02


def test_growth_begins_with_a_sixteenth():
    assert [first_size(k) for k in (1, 8, 9, 128, 256, 1024)] == [1, 8, 8, 8, 16, 64]
