"""The record of parameters: scikit-learn's shapes and algebra, a digest over bits, refusals that name what is wrong."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture as SklearnMixture

from streamgmm.errors import DamagedFileError, DataError, RequestError
from streamgmm.mixture import Mixture, covariance_shape, load_model
from streamgmm.storage import save_tensors
from tests.oracles import COVARIANCE_TYPES, dense_covariances, log_joint, random_mixture

K, D = 3, 4


@pytest.fixture(params=COVARIANCE_TYPES)
def mixture(request: pytest.FixtureRequest) -> Mixture:
    return random_mixture(request.param, K, D)


def test_shapes(mixture):
    assert (mixture.n_components, mixture.n_features) == (K, D)
    assert mixture.covariances.shape == covariance_shape(mixture.covariance_type, K, D)


def test_arrays_are_fp64_copies_that_cannot_be_changed():
    means = np.zeros((2, 3), dtype=np.float32, order="F")
    mixture = Mixture(np.full(2, 0.5), means, np.ones(2), "spherical")
    means[:] = 7
    assert mixture.means.dtype == np.float64
    assert mixture.means.flags.c_contiguous
    assert not mixture.means.any()
    with pytest.raises(ValueError, match="read-only"):
        mixture.means[0, 0] = 1


def test_precisions_invert_the_covariances(mixture):
    dense = dense_covariances(mixture)
    if mixture.covariance_type in ("diag", "spherical"):
        np.testing.assert_allclose(mixture.precisions_cholesky, 1 / np.sqrt(mixture.covariances), rtol=1e-14)
        np.testing.assert_allclose(mixture.precisions * mixture.covariances, 1, rtol=1e-14)
        return
    chol = np.broadcast_to(mixture.precisions_cholesky, dense.shape)
    assert np.array_equal(chol, np.triu(chol))
    assert (np.diagonal(chol, axis1=1, axis2=2) > 0).all()
    np.testing.assert_allclose(chol @ chol.transpose(0, 2, 1), np.linalg.inv(dense), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        np.broadcast_to(mixture.precisions, dense.shape) @ dense, np.eye(D) + 0 * dense, atol=1e-12
    )


def test_scikit_learn_takes_the_arrays_as_they_are(mixture):
    x = np.random.default_rng(1).normal(size=(20, D))
    theirs = SklearnMixture(K, covariance_type=mixture.covariance_type)
    theirs.weights_, theirs.means_, theirs.covariances_ = mixture.weights, mixture.means, mixture.covariances
    theirs.precisions_cholesky_ = mixture.precisions_cholesky
    np.testing.assert_allclose(theirs.score_samples(x), logsumexp(log_joint(x, mixture), axis=1), rtol=1e-10)
    assert mixture.n_parameters == theirs._n_parameters()


def test_the_digest_is_the_documented_one(mixture):
    parameters = (mixture.weights, mixture.means, mixture.covariances)
    payload = b"".join(np.ascontiguousarray(array, dtype="<f8").tobytes() for array in parameters)
    assert mixture.digest == hashlib.sha256(payload).hexdigest()
    nudged = Mixture(mixture.weights, np.nextafter(mixture.means, 9), mixture.covariances, mixture.covariance_type)
    assert nudged.digest != mixture.digest


def test_save_and_load_keep_every_bit(mixture, tmp_path):
    mixture.save(tmp_path / "model.safetensors", note="x", format="cannot be overridden")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        loaded, metadata = load_model(path)
        assert loaded.digest == mixture.digest == metadata["digest"]
        assert loaded.covariance_type == mixture.covariance_type
        assert metadata["note"] == "x"


def test_what_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Mixture.load(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = random_mixture("diag", K, D).tensors()
    for tensors, metadata, told in [
        (arrays, {"format": "other"}, "holds 'other'"),
        (arrays, {}, "holds 'None'"),
        (arrays, {"format": "streamgmm-model"}, "not a usable model"),
        (arrays, {"format": "streamgmm-model", "covariance_type": "round"}, "not a usable model"),
        (arrays, {"format": "streamgmm-model", "covariance_type": "full"}, "not a usable model"),
        (
            {"weights": arrays["weights"]},
            {"format": "streamgmm-model", "covariance_type": "diag"},
            "not a usable model",
        ),
    ]:
        save_tensors(path, tensors, metadata)
        with pytest.raises(DamagedFileError, match=told):
            Mixture.load(path)


@pytest.mark.parametrize("name", ["weights", "means", "covariances"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    arrays = {key: array.copy() for key, array in random_mixture("diag", K, D).tensors().items()}
    arrays[name].flat[0] = value
    with pytest.raises(RequestError, match=f"{name} must be finite"):
        Mixture(**arrays, covariance_type="diag")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"covariance_type": "round"}, "covariance_type must be one of"),
        ({"means": np.zeros(3)}, "means must have shape"),
        ({"weights": np.ones(2)}, r"weights must have shape \(3,\)"),
        ({"covariances": np.ones((4, 3))}, r"covariances must have shape \(3, 4\)"),
    ],
)
def test_shapes_that_disagree_are_refused(changes, told):
    arguments = {**random_mixture("diag", K, D).tensors(), "covariance_type": "diag", **changes}
    with pytest.raises(RequestError, match=told):
        Mixture(**arguments)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_covariances_that_are_not_positive_definite_are_refused(kind):
    covariances = np.zeros(covariance_shape(kind, K, D))
    mixture = Mixture(np.full(K, 1 / K), np.zeros((K, D)), covariances, kind)
    with pytest.raises(RequestError, match="covariances must be positive"):
        _ = mixture.precisions_cholesky
