"""Streamed use of a model against SciPy's densities, whatever the chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from streamgmm.errors import DataError, NumericalError, RequestError
from streamgmm.inference import (
    InferenceSettings,
    frame_of_mixture,
    log_likelihoods,
    mean_log_likelihood,
    posteriors,
    responsibilities,
    sample,
)
from streamgmm.io.sources import open_source
from streamgmm.io.sources.array import ArraySource
from streamgmm.mixture import Mixture
from tests.oracles import COVARIANCE_TYPES, clustered, dense_covariances, log_joint, random_mixture

CPU = torch.device("cpu")
EXACT = InferenceSettings(CPU, "highest")
N, K, D = 9001, 5, 4


@pytest.fixture(params=COVARIANCE_TYPES)
def mixture(request: pytest.FixtureRequest) -> Mixture:
    return random_mixture(request.param, K, D)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return clustered(N, K, D)


def joined(source: ArraySource, mixture: Mixture, top: int, how: InferenceSettings) -> tuple[np.ndarray, ...]:
    chunks = list(posteriors(source, mixture, top, how))
    return tuple(np.concatenate([getattr(c, name) for c in chunks]) for name in ("log_likelihood", "labels", "resp"))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_likelihoods_labels_and_responsibilities_are_exact(mixture, rows, offset, scale):
    moved = Mixture(
        mixture.weights, mixture.means * scale + offset, mixture.covariances * scale**2, mixture.covariance_type
    )
    x = rows * scale + offset
    joint = log_joint(x, moved)
    expected = logsumexp(joint, axis=1)
    source = ArraySource(x)
    likelihood, labels, resp = joined(source, moved, 3, EXACT)
    np.testing.assert_allclose(likelihood, expected, rtol=1e-9, atol=1e-7)
    order = np.argsort(-joint, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(labels, order)
    exact = np.exp(joint - expected[:, None])
    np.testing.assert_allclose(resp, np.take_along_axis(exact, order, 1), rtol=1e-5, atol=1e-12)
    dense = np.concatenate(list(responsibilities(source, moved, EXACT)))
    np.testing.assert_allclose(dense, exact, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(np.concatenate(list(log_likelihoods(source, moved, EXACT))), likelihood)
    assert mean_log_likelihood(source, moved, EXACT) == pytest.approx(expected.mean(), rel=1e-10)


def test_auto_agrees_with_fp64_within_its_bounds(mixture, rows):
    expected = logsumexp(log_joint(rows, mixture), axis=1)
    likelihood, labels, _ = joined(ArraySource(rows), mixture, 1, InferenceSettings(CPU))
    assert np.abs(likelihood - expected).mean() < 1e-2
    assert (labels[:, 0] == log_joint(rows, mixture).argmax(1)).mean() > 0.999


@pytest.mark.parametrize("precision", ["auto", "highest"])
@given(
    chunk_rows=st.one_of(st.none(), st.integers(1, 20_000)),
    memory_limit=st.one_of(st.none(), st.integers(64 << 20, 1 << 30)),
    threads=st.sampled_from([1, 4]),
)
@settings(max_examples=10, deadline=None)
def test_chunks_memory_and_threads_change_no_bit(precision, rows, chunk_rows, memory_limit, threads):
    mixture, source = random_mixture("full", K, D), ArraySource(rows.astype(np.float32))
    reference = joined(source, mixture, 2, InferenceSettings(CPU, precision))
    result = joined(source, mixture, 2, InferenceSettings(CPU, precision, memory_limit, chunk_rows, threads))
    for expected, found in zip(reference, result, strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("top", [1, 3])
def test_chunks_change_no_bit_on_a_gpu_where_results_come_one_chunk_late(top):
    mixture, source = random_mixture("diag", 64, D), ArraySource(clustered(100_003, 64, D).astype(np.float32))
    settings = [InferenceSettings(torch.device("cuda"), chunk_rows=rows) for rows in (None, 50_000, 9_999)]
    whole, *others = (joined(source, mixture, top, asked) for asked in settings)
    for result in others:
        for expected, found in zip(whole, result, strict=True):
            assert found.tobytes() == expected.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [3, 60_001, 100_002])
def test_a_row_that_is_not_finite_is_named_on_a_gpu(bad):
    x = clustered(100_003, 4, D).astype(np.float32)
    x[bad, 2] = np.inf
    settings = InferenceSettings(torch.device("cuda"), "medium", chunk_rows=20_000)
    with pytest.raises(DataError, match=f"row {bad} of array: column 2 is inf"):
        joined(ArraySource(x), random_mixture("diag", K, D), 1, settings)


@pytest.mark.parametrize("top", [1, 2, 4])
def test_ties_go_to_the_lower_index(top):
    twin = random_mixture("diag", 2, D)
    order = [0, 1, 0, 1]  # components 0 and 2 are the same, as are 1 and 3
    mixture = Mixture(np.full(4, 0.25), twin.means[order], twin.covariances[order], "diag")
    x = clustered(500, 2, D)
    _, labels, resp = joined(ArraySource(x), mixture, top, EXACT)
    first = log_joint(x, twin).argmax(1)
    expected = np.stack([first, first + 2, 1 - first, 3 - first], axis=1)[:, :top]
    # Equal weights here, unequal ones in ``twin``.
    keep = (
        np.abs(np.diff(log_joint(x, Mixture(np.full(2, 0.5), twin.means, twin.covariances, "diag")), axis=1)[:, 0]) > 9
    )
    np.testing.assert_array_equal(labels[keep], expected[keep])
    np.testing.assert_allclose(resp[keep, :2], 0.5, atol=1e-3)


@pytest.mark.parametrize("precision", ["auto", "highest"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8", "uint8"])
def test_every_stored_type_means_its_values(dtype, precision):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (700, D))).to(getattr(torch, dtype))
    mixture = random_mixture("full", K, D, spread=30.0)
    expected = logsumexp(log_joint(x.double().numpy(), mixture), axis=1)
    found = joined(ArraySource(x), mixture, 1, InferenceSettings(CPU, precision))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-9 if precision == "highest" else 1e-4)


@pytest.mark.parametrize("row", [1, 3000])
def test_a_bfloat16_that_is_not_finite_is_named(row):
    x = torch.zeros((N, D), dtype=torch.bfloat16)
    x[row, 2] = np.nan
    with pytest.raises(DataError, match=f"row {row} of array: column 2 is nan"):
        mean_log_likelihood(ArraySource(x), random_mixture("diag", K, D), InferenceSettings(CPU))


def test_one_row_one_feature_one_component():
    mixture = Mixture(np.ones(1), np.zeros((1, 1)), np.ones(1), "spherical")
    likelihood, labels, resp = joined(ArraySource(np.zeros((1, 1))), mixture, 1, EXACT)
    np.testing.assert_allclose(likelihood, -0.5 * np.log(2 * np.pi))
    assert labels.tolist() == [[0]]
    assert resp.tolist() == [[1.0]]


def test_a_component_of_weight_zero_is_never_chosen(rows):
    given_mixture = random_mixture("diag", K, D)
    weights = given_mixture.weights.copy()
    weights[2] = 0
    mixture = Mixture(weights / weights.sum(), given_mixture.means, given_mixture.covariances, "diag")
    _, labels, _ = joined(ArraySource(rows), mixture, 1, EXACT)
    assert not (labels == 2).any()
    dense = np.concatenate(list(responsibilities(ArraySource(rows), mixture, EXACT)))
    assert not dense[:, 2].any()
    np.testing.assert_allclose(dense.sum(1), 1)


@pytest.mark.parametrize("top", [0, -1, K + 1])
def test_top_out_of_range_is_refused(rows, top):
    with pytest.raises(RequestError, match=f"top must be between 1 and {K} .*; got {top}"):
        next(posteriors(ArraySource(rows), random_mixture("diag", K, D), top, EXACT))


def test_another_dimension_is_refused(rows):
    with pytest.raises(RequestError, match="array has 4 features and the model 7"):
        mean_log_likelihood(ArraySource(rows), random_mixture("diag", K, 7), EXACT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 4321, N - 1])
@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_a_value_that_is_not_finite_is_named(rows, tmp_path, value, row, precision):
    bad = rows.astype(np.float32)
    bad[row, 3] = value
    np.save(tmp_path / "a.npy", bad[:4000])
    np.save(tmp_path / "b.npy", bad[4000:])
    source = open_source([tmp_path / "a.npy", tmp_path / "b.npy"])
    name, local = ("a.npy", row) if row < 4000 else ("b.npy", row - 4000)
    with pytest.raises(DataError, match=rf"row {local} of .*{name}: column 3 is {value}"):
        mean_log_likelihood(source, random_mixture("diag", K, D), InferenceSettings(CPU, precision))


def test_a_likelihood_that_overflows_in_fp32_is_told():
    x = np.full((10, 2), 1e30, dtype=np.float32)
    mixture = Mixture(np.ones(1), np.zeros((1, 2)), np.ones((1, 2)), "diag")
    with pytest.raises(NumericalError, match="use precision='highest'"):
        mean_log_likelihood(ArraySource(x), mixture, InferenceSettings(CPU, "medium"))
    assert mean_log_likelihood(ArraySource(x), mixture, InferenceSettings(CPU)) == pytest.approx(-1e60, rel=1e-6)


def test_the_frame_brings_the_mixture_near_unit_deviation(mixture):
    frame = frame_of_mixture(mixture, np.dtype(np.float64))
    dense = dense_covariances(mixture)
    mean = mixture.weights @ mixture.means
    spread = mixture.weights @ (np.diagonal(dense, axis1=1, axis2=2) + (mixture.means - mean) ** 2)
    scaled = np.sqrt(spread) * frame.scale
    if mixture.covariance_type == "spherical":
        scaled = np.sqrt(spread.mean()) * frame.scale
    assert ((scaled > 0.7) & (scaled < 1.5)).all()
    assert np.array_equal(np.frexp(frame.scale)[0], np.full(D, 0.5))
    np.testing.assert_allclose(frame.shift, mean, rtol=1e-6)


def test_samples_have_the_mixture_s_moments(mixture):
    x, labels = sample(mixture, 60_000, np.random.RandomState(0))
    assert x.shape == (60_000, D)
    assert (np.diff(labels) >= 0).all()
    np.testing.assert_allclose(np.bincount(labels, minlength=K) / len(x), mixture.weights, atol=0.01)
    dense = dense_covariances(mixture)
    for k in range(K):
        own = x[labels == k]
        np.testing.assert_allclose(own.mean(0), mixture.means[k], atol=0.1)
        np.testing.assert_allclose(np.cov(own.T), dense[k], atol=0.15)


def test_samples_are_those_of_their_seed_and_at_least_one(mixture):
    first, again = (sample(mixture, 50, np.random.RandomState(3))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for n in (0, -1):
        with pytest.raises(RequestError, match=f"n_samples must be at least 1; got {n}"):
            sample(mixture, n, np.random.RandomState(0))


def test_a_limit_that_nothing_fits_is_refused(rows):
    settings = InferenceSettings(CPU, memory_limit=1 << 20)
    with pytest.raises(RequestError, match=r"memory limit 1.0 MiB is too small .* at least \d+ MiB is needed"):
        next(posteriors(ArraySource(rows), random_mixture("diag", K, D), 1, settings))


class UncachedSource(ArraySource):
    """As if its rows lay in a file on a file system that has something to say."""

    def view(self, start, stop):
        return None

    @property
    def stored_bytes(self):
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read_uncached(self, start, stop, out):
        self.read_into(start, stop, out)
        return "O_DIRECT is refused"


def test_what_reading_has_to_say_is_told(rows):
    told = []
    source = UncachedSource(rows)
    how = InferenceSettings(CPU, "highest", host_memory=0, notify=told.append)
    mixture = random_mixture("diag", K, D)
    assert mean_log_likelihood(source, mixture, how) == mean_log_likelihood(ArraySource(rows), mixture, EXACT)
    assert told == ["O_DIRECT is refused"]
