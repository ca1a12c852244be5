"""What ``X`` may be, and what is said of what it may not be."""

from __future__ import annotations

import warnings

import dask.array
import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError
from tests.oracles import COVARIANCE_TYPES, clustered

X = clustered(900, 3, 4, spread=2.0)
SETTINGS = {"covariance_type": "diag", "random_state": 0, "device": "cpu"}


def with_value(value):
    """X with ``value`` in row 5, column 2."""
    x = X.copy()
    x[5, 2] = value
    return x


def mixture(x, **arguments):
    return GaussianMixture(3, **SETTINGS).fit(x, **arguments)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.tolist(),
        lambda x: tuple(map(tuple, x)),
        pandas.DataFrame,
        np.asfortranarray,
        lambda x: x.astype(object),
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: x.astype(">f8"),
        open_source,
    ],
    ids=["list", "tuple", "frame", "Fortran", "objects", "strided", "big-endian", "source"],
)
def test_forms_of_the_same_rows(form):
    assert mixture(form(X)).mixture_.digest == mixture(X).mixture_.digest
    expected = mixture(X)
    for method in ("predict", "predict_proba", "score_samples", "score", "bic"):
        assert np.array_equal(getattr(expected, method)(form(X)), getattr(expected, method)(X)), method


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:, 0], "Expected 2D array, got 1D array instead"),
        (X[0, 0], "Expected 2D array, got scalar array instead"),
        (X[None], "Found array with dim 3"),
        (X[:0], "Found array with 0 sample"),
        (X[:1], "Found array with 1 sample"),
        (X[:, :0], r"0 feature\(s\) \(shape=\(900, 0\)\) while a minimum of 1 is required"),
        (scipy.sparse.csr_matrix(X), "Sparse data was passed"),
        (X.astype(complex), "Complex data not supported"),
        (with_value(np.nan), "Input X contains NaN"),
        (with_value(np.inf), "Input X contains infinity"),
        ([["a", "b"], ["c", "d"]], "could not convert|strings"),
        (np.array([[{}, 1.0], [2.0, 3.0]], dtype=object), "must be a string or a real number|not 'dict'"),
        ([[1.0, 2.0], [3.0]], "inhomogeneous"),
        (None, "Expected 2D array|NoneType|Found array with dim"),
        (np.ma.masked_greater(X, 1), "has masked values"),
        (dask.array.from_array(X[:, 0]), "must be two-dimensional"),
        (torch.from_numpy(X)[:, 0], "must be two-dimensional"),
        ("missing.npy", "missing.npy: no such file"),
    ],
    ids=lambda value: None if isinstance(value, str) else "x",
)
def test_what_cannot_be_fitted_or_scored(x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mixture(x)
    if not (isinstance(x, np.ndarray) and x.shape == (1, 4)):  # one row can be scored
        with pytest.raises((ValueError, TypeError), match=message):
            mixture(X).predict(x)


def test_a_file_that_is_not_finite_is_named(tmp_path):
    np.save(tmp_path / "x.npy", with_value(np.nan))
    with pytest.raises(DataError, match=r"row 5 of .*x.npy: column 2 is nan"):
        mixture(tmp_path / "x.npy")
    with pytest.raises(DataError, match=r"row 5 of .*x.npy: column 2 is nan"):
        mixture(X).partial_fit(tmp_path / "x.npy")


def test_every_form_is_held_to_the_features_of_the_fit(tmp_path):
    fitted, narrow = mixture(X), X[:, :3].copy()
    np.save(tmp_path / "x.npy", narrow)
    stored = zarr.create_array(tmp_path / "x.zarr", shape=narrow.shape, dtype=narrow.dtype, chunks=(100, 3))
    stored[:] = narrow
    for x in (narrow, tmp_path / "x.npy", stored, torch.from_numpy(narrow), dask.array.from_array(narrow), [narrow]):
        for call in (fitted.predict, fitted.score, fitted.partial_fit, lambda x: fitted.outlier_threshold(x, 0.1)):
            with pytest.raises(ValueError, match="X has 3 features, but GaussianMixture is expecting 4 features"):
                call(x)
    assert fitted.fit(tmp_path / "x.npy").n_features_in_ == 3


def test_names_of_features():
    frame = pandas.DataFrame(X, columns=list("abcd"))
    fitted = mixture(frame)
    assert fitted.feature_names_in_.tolist() == list("abcd")
    assert np.array_equal(fitted.predict(frame), mixture(X).predict(X))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        fitted.predict(X)
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame[["b", "a", "c", "d"]])
    assert not hasattr(fitted.fit(X), "feature_names_in_")


def batches(x, cuts):
    yield from np.split(x, sorted(cuts))


@given(st.lists(st.integers(0, 900), max_size=6))
@settings(max_examples=12, deadline=None)
def test_an_iterator_gives_the_bits_of_the_array(cuts):
    x = X.astype(np.float32)
    assert mixture(batches(x, cuts)).mixture_.digest == mixture(x).mixture_.digest


def test_iterators_of_anything_serve_every_method(tmp_path):
    np.save(tmp_path / "x.npy", X[:100])
    parts = (tmp_path / "x.npy", X[100:200].tolist(), torch.from_numpy(X[200:500]), X[500:500], open_source(X[500:]))
    expected = mixture(X)
    assert np.array_equal(GaussianMixture(3, **SETTINGS).fit_predict(iter(parts)), expected.predict(X))
    assert np.array_equal(expected.score_samples(iter(parts)), expected.score_samples(X))
    assert expected.outlier_threshold(iter(parts), 0.25) == expected.outlier_threshold(X, 0.25)


def test_the_temporary_file_is_gone_also_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def failing():
        yield X
        assert list(tmp_path.iterdir()) == []  # it never has a name
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        mixture(failing())
    mixture(iter([X]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_weights_are_repetitions(kind, tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, size=len(X))
    start = GaussianMixture(3, covariance_type=kind, random_state=0, max_iter=0).fit(X)
    given = {"weights_init": start.weights_, "means_init": start.means_, "precisions_init": start.precisions_}
    estimator = GaussianMixture(3, covariance_type=kind, random_state=0, **given)
    repeated = np.repeat(X, counts, axis=0)
    expected = estimator.fit(repeated).mixture_
    score = estimator.score(repeated)
    np.save(tmp_path / "weights.npy", counts)
    for weights in (counts, counts.tolist(), pandas.Series(counts), 0.125 * counts, tmp_path / "weights.npy"):
        found = estimator.fit(X, sample_weight=weights).mixture_
        np.testing.assert_allclose(found.means, expected.means, rtol=1e-9)
        np.testing.assert_allclose(found.covariances, expected.covariances, rtol=1e-9, atol=1e-12)
        assert np.isclose(estimator.score(X, sample_weight=weights), score, rtol=1e-12)
    labels = estimator.fit_predict(X, sample_weight=counts)
    assert np.array_equal(labels, estimator.predict(X))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), "shape"),
        (np.ones((900, 2)), "must be 1D"),
        (-np.ones(900), "Negative values"),
        (np.full(900, np.nan), "NaN"),
        (np.zeros(900), "count|zero"),
        ("missing.npy", "no such file"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    for call in (GaussianMixture(2).fit, GaussianMixture(2).partial_fit, mixture(X).score):
        with pytest.raises(ValueError, match=message):
            call(X, sample_weight=weights)


def test_no_warning_comes_from_read_only_rows(tmp_path):
    x = X.astype(np.float32)
    x.flags.writeable = False
    np.save(tmp_path / "x.npy", x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = mixture(x)
        fitted.predict(np.load(tmp_path / "x.npy", mmap_mode="r"))
        fitted.partial_fit(x)
