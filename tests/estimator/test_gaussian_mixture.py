from __future__ import annotations

import pickle
import warnings

import dask.array
import numpy as np
import pytest
import torch
import zarr
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Peer

from streamgmm import GaussianMixture, Mixture
from streamgmm.errors import DamagedFileError, DataError, RequestError
from tests.oracles import COVARIANCE_TYPES, clustered

X = clustered(4000, 4, 6, spread=1.5)
NAMES = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")


def given(kind: str) -> dict[str, object]:
    """A start that both take as it is."""
    start = GaussianMixture(4, covariance_type=kind, max_iter=0, random_state=0, device="cpu").fit(X)
    return {"weights_init": start.weights_, "means_init": start.means_, "precisions_init": start.precisions_}


def fitted(estimator, x=X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize(("precision", "dtype", "bound"), [("highest", np.float64, 1e-6), ("high", np.float32, 1e-3)])
def test_twenty_iterations_are_scikit_learns(kind, precision, dtype, bound):
    common = {"covariance_type": kind, "tol": 0.0, "max_iter": 20, **given(kind)}
    peer = fitted(Peer(4, **common))
    ours = fitted(GaussianMixture(4, precision=precision, device="cpu", **common), X.astype(dtype))
    for name in NAMES:
        expected, found = getattr(peer, name), getattr(ours, name)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max(), name
    np.testing.assert_allclose(ours.lower_bounds_, peer.lower_bounds_, rtol=bound)
    assert ours.n_iter_ == peer.n_iter_ == 20
    assert ours.converged_ == peer.converged_ is False


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_stops_where_scikit_learn_stops(kind):
    common = {"covariance_type": kind, "tol": 1e-4, "max_iter": 200, **given(kind)}
    peer = Peer(4, **common).fit(X)
    ours = GaussianMixture(4, precision="highest", device="cpu", **common).fit(X)
    assert ours.converged_
    assert ours.n_iter_ == peer.n_iter_
    assert np.isclose(ours.lower_bound_, peer.lower_bound_, rtol=1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_inference_is_scikit_learns(kind):
    ours = fitted(GaussianMixture(4, covariance_type=kind, random_state=0, precision="highest", device="cpu"))
    peer = Peer(4, covariance_type=kind)
    peer.weights_, peer.means_, peer.covariances_ = ours.weights_, ours.means_, ours.covariances_
    peer.precisions_cholesky_ = ours.precisions_cholesky_
    np.testing.assert_allclose(ours.score_samples(X), peer.score_samples(X), rtol=1e-9)
    np.testing.assert_allclose(ours.predict_proba(X), peer.predict_proba(X), atol=1e-9)
    assert np.array_equal(ours.predict(X), peer.predict(X))
    for name in ("score", "bic", "aic"):
        assert np.isclose(getattr(ours, name)(X), getattr(peer, name)(X), rtol=1e-9)
    for ours_drawn, peers_drawn in zip(ours.sample(50), ours.sample(50), strict=True):
        assert ours_drawn.shape == peers_drawn.shape


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_samples_follow_the_mixture(kind):
    estimator = fitted(GaussianMixture(4, covariance_type=kind, random_state=0, device="cpu"))
    drawn, labels = estimator.sample(40_000)
    assert drawn.shape == (40_000, 6)
    np.testing.assert_allclose(np.bincount(labels) / 40_000, estimator.weights_, atol=0.01)
    for k in range(4):
        np.testing.assert_allclose(drawn[labels == k].mean(0), estimator.means_[k], atol=0.1)
    again = fitted(GaussianMixture(4, covariance_type=kind, random_state=1, device="cpu"), drawn)
    assert abs(again.score(X) - estimator.score(X)) < 0.05


def forms(tmp_path) -> dict[str, object]:
    """The same rows as everything that ``fit`` takes."""
    x = X.astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "head.npy", x[:1500])
    np.save(tmp_path / "tail.npy", x[1500:])
    stored = zarr.create_array(tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(512, 6), shards=(1024, 6))
    stored[:] = x
    return {
        "path": tmp_path / "x.npy",
        "str": str(tmp_path / "x.npy"),
        "list": [tmp_path / "head.npy", tmp_path / "tail.npy"],
        "array": x,
        "memmap": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "torch": torch.from_numpy(x),
        "zarr": stored,
        "zarr path": tmp_path / "x.zarr",
        "dask": dask.array.from_array(x, chunks=(700, 6)),
    }


def test_every_form_of_data_gives_the_same_bits(tmp_path):
    digests, labels = {}, {}
    for name, data in forms(tmp_path).items():
        estimator = fitted(GaussianMixture(3, covariance_type="diag", random_state=0, max_iter=5, device="cpu"), data)
        digests[name] = estimator.mixture_.digest
        labels[name] = estimator.predict(data).tobytes()
    assert len(set(digests.values())) == 1, digests
    assert len(set(labels.values())) == 1


def test_fit_predict_clone_pickle_and_parameters():
    estimator = GaussianMixture(3, covariance_type="diag", random_state=0, device="cpu", memory_limit="1GiB")
    assert clone(estimator).get_params() == estimator.get_params()
    labels = estimator.fit_predict(X)
    assert np.array_equal(labels, estimator.predict(X))
    assert labels.dtype == np.int64
    restored = pickle.loads(pickle.dumps(estimator))
    assert np.array_equal(restored.predict(X), labels)


def test_save_and_load(tmp_path):
    estimator = GaussianMixture(3, covariance_type="tied", random_state=0, device="cpu").fit(X)
    path = tmp_path / "model.safetensors"
    estimator.save(path)
    loaded = GaussianMixture.load(path)
    assert loaded.mixture_.digest == estimator.mixture_.digest
    assert loaded.converged_ is True
    assert loaded.n_iter_ == estimator.n_iter_
    assert loaded.lower_bound_ == estimator.lower_bound_
    assert np.array_equal(loaded.predict(X), estimator.predict(X))
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedFileError, match="checksum"):
        GaussianMixture.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        GaussianMixture.load(tmp_path / "missing")


def test_checkpointed_fit_resumes_and_extends(tmp_path):
    def estimator(iterations: int) -> GaussianMixture:
        run = tmp_path / "run"
        return GaussianMixture(3, covariance_type="diag", random_state=0, tol=0, max_iter=iterations, checkpoint=run)

    long = fitted(GaussianMixture(3, covariance_type="diag", random_state=0, tol=0, max_iter=6))
    assert fitted(estimator(3)).n_iter_ == 3
    assert fitted(estimator(6)).mixture_.digest == long.mixture_.digest
    assert Mixture.load(tmp_path / "run").digest == long.mixture_.digest
    with pytest.raises(RequestError, match="was made differently"):
        GaussianMixture(4, covariance_type="diag", random_state=0, checkpoint=tmp_path / "run").fit(X)


def test_warm_start_goes_on():
    whole = fitted(GaussianMixture(3, random_state=0, max_iter=6, tol=0, precision="highest", device="cpu"))
    parts = GaussianMixture(3, random_state=0, max_iter=3, tol=0, precision="highest", device="cpu", warm_start=True)
    fitted(fitted(parts))
    np.testing.assert_allclose(parts.means_, whole.means_, rtol=1e-9)


def test_not_converged_warns_and_zero_iterations_do_not():
    with pytest.warns(ConvergenceWarning, match="not converged after 1 iterations"):
        GaussianMixture(4, max_iter=1, device="cpu").fit(X)
    assert GaussianMixture(4, max_iter=0, device="cpu").fit(X).n_iter_ == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_components": 0}, "n_components must be at least 1; got 0"),
        ({"n_components": 5000}, "n_components is 5000 and array has only 4000 rows"),
        ({"n_components": 2.5}, "n_components must be an int"),
        ({"covariance_type": "round"}, "covariance_type must be one of full, tied, diag, spherical; got 'round'"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"tol": float("nan")}, "tol must be at least 0"),
        ({"reg_covar": -1e-6}, "reg_covar must be at least 0"),
        ({"init_params": "best"}, "init must be one of kmeans"),
        ({"means_init": np.zeros((3, 3))}, r"means_init must have shape \(2, 6\); got \(3, 3\)"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"precision": "low"}, "precision must be auto or one of"),
        ({"memory_limit": "1MiB"}, "memory limit 1.0 MiB is too small .* at least"),
        ({"memory_limit": "much"}, "memory_limit must be a size such as"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_requests_that_cannot_be_met(changes, message):
    with pytest.raises(RequestError, match=message):
        GaussianMixture(**{"n_components": 2, "device": "cpu", **changes}).fit(X)


def test_use_before_fit_and_wrong_dimension():
    with pytest.raises(NotFittedError):
        GaussianMixture(2).predict(X)
    with pytest.raises(RequestError, match="has 3 features and the model 6"):
        GaussianMixture(2, device="cpu").fit(X).predict(X[:, :3])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_one_row_one_feature_and_as_many_components_as_rows(kind):
    for x, k in ((X[:1], 1), (X[:9, :1], 2), (X[:5], 5)):
        estimator = fitted(GaussianMixture(k, covariance_type=kind, random_state=0, device="cpu"), x)
        assert np.isfinite(estimator.means_).all()
        assert np.isfinite(estimator.score(x))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_units_give_the_same_mixture(kind, scale):
    start = {"random_state": 0, "covariance_type": kind, "reg_covar": 0.0, "tol": 0.0, "max_iter": 10, "device": "cpu"}
    plain = fitted(GaussianMixture(3, **start), X)
    scaled = fitted(GaussianMixture(3, **start), X * scale)
    np.testing.assert_allclose(scaled.weights_, plain.weights_, rtol=1e-4)
    np.testing.assert_allclose(scaled.means_ / scale, plain.means_, rtol=1e-3, atol=1e-3)
