from __future__ import annotations

import io
import pickle
import warnings

import dask.array
import joblib
import numpy as np
import pandas
import pytest
import torch
import zarr
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Peer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from streamgmm import GaussianMixture, Mixture
from streamgmm.errors import DamagedFileError, DataError, RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources import open_source
from streamgmm.request import FitRequest
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


def test_whatever_was_fitted_is_what_is_used():
    estimator = fitted(GaussianMixture(3, covariance_type="full", random_state=0), X.astype(np.float32))
    exact = estimator.mixture_
    assert estimator.means_.dtype == np.float32
    assert exact.means.astype(np.float32).tobytes() == estimator.means_.tobytes() != exact.means.tobytes()
    assert pickle.loads(pickle.dumps(estimator)).mixture_.digest == exact.digest
    estimator.means_[0] += 1  # in place, as scikit-learn allows
    assert estimator.mixture_.digest != exact.digest
    np.testing.assert_allclose(estimator.mixture_.means[0], exact.means[0] + 1, rtol=1e-6)


def test_attributes_that_were_set_make_a_mixture():
    """As people do to use parameters that came from elsewhere."""
    given = fitted(GaussianMixture(3, random_state=0))
    built = GaussianMixture(3)
    built.weights_, built.means_, built.covariances_ = given.weights_, given.means_, given.covariances_
    np.testing.assert_array_equal(built.score_samples(X), given.score_samples(X))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-9), (np.float32, 1e-3)])
def test_to_scikit_learn_and_back(kind, dtype, bound):
    x = X.astype(dtype)
    ours = GaussianMixture(4, covariance_type=kind, random_state=0, reg_covar=1e-5, device="cpu").fit(x)
    peer = ours.to_sklearn()
    assert type(peer) is Peer
    assert peer.get_params() == {name: ours.get_params()[name] for name in peer.get_params()}
    for name in (*NAMES, "converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_features_in_"):
        assert np.array_equal(getattr(peer, name), getattr(ours, name)), name
    np.testing.assert_allclose(peer.score_samples(x), ours.score_samples(x), atol=bound, rtol=bound)
    np.testing.assert_allclose(peer.predict_proba(x), ours.predict_proba(x), atol=bound)
    assert np.mean(peer.predict(x) == ours.predict(x)) > 1 - bound
    back = GaussianMixture.from_sklearn(peer, device="cpu", memory_limit="1GiB")
    assert back.get_params() == {**ours.get_params(), "memory_limit": "1GiB"}
    np.testing.assert_allclose(back.score_samples(X), ours.score_samples(X), atol=bound, rtol=bound)
    peer.means_ += 1  # what was handed over is theirs
    assert not np.array_equal(peer.means_, ours.means_)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_mixture_that_scikit_learn_fitted(kind):
    peer = Peer(4, covariance_type=kind, random_state=0).fit(X)
    ours = GaussianMixture.from_sklearn(peer, device="cpu")
    np.testing.assert_allclose(ours.score_samples(X), peer.score_samples(X), rtol=1e-9)
    np.testing.assert_allclose(ours.predict_proba(X), peer.predict_proba(X), atol=1e-9)
    assert ours.fit(X).n_features_in_ == 6
    assert not hasattr(GaussianMixture.from_sklearn(Peer(2)), "means_")
    with pytest.raises(RequestError, match=r"must be a sklearn.mixture.GaussianMixture; got dict"):
        GaussianMixture.from_sklearn({})


def test_pipelines_and_grids():
    names = [f"x{i}" for i in range(X.shape[1])]
    frame = pandas.DataFrame(X[:600], columns=names)
    line = make_pipeline(StandardScaler().set_output(transform="pandas"), GaussianMixture(2, random_state=0))
    grid = GridSearchCV(line, {"gaussianmixture__n_components": [1, 3], "gaussianmixture__covariance_type": ["diag"]})
    grid.fit(frame)
    assert grid.best_params_["gaussianmixture__n_components"] == 3
    assert grid.best_estimator_[-1].feature_names_in_.tolist() == names
    assert np.isfinite(grid.score(frame))
    assert grid.best_estimator_[-1].to_sklearn().feature_names_in_.tolist() == names


def test_pickles_hold_no_open_files(tmp_path):
    np.save(tmp_path / "x.npy", X)
    estimator = fitted(GaussianMixture(3, random_state=0, device="cpu"), tmp_path / "x.npy")
    (tmp_path / "x.npy").unlink()
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    buffer.seek(0)
    assert np.array_equal(joblib.load(buffer).predict(X), estimator.predict(X))
    assert not [name for name in pickle.dumps(estimator).split(b"\x8c") if b"torch" in name]


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
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        GaussianMixture(4, max_iter=1, device="cpu").fit(X)
    assert GaussianMixture(4, max_iter=0, device="cpu").fit(X).n_iter_ == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_components": 0}, "The 'n_components' parameter of GaussianMixture must be an int in the range"),
        ({"n_components": 5000}, "Expected n_samples >= n_components but got n_components = 5000, n_samples = 4000"),
        ({"n_components": 2.5}, "The 'n_components' parameter of GaussianMixture must be an int"),
        ({"covariance_type": "round"}, "The 'covariance_type' parameter of GaussianMixture must be a str among"),
        ({"tol": -1.0}, "The 'tol' parameter"),
        ({"tol": float("nan")}, "The 'tol' parameter"),
        ({"reg_covar": -1e-6}, "The 'reg_covar' parameter"),
        ({"reg_covar": float("inf")}, r"The 'reg_covar' parameter .* in the range \[0.0, inf\)"),
        ({"init_params": "best"}, "The 'init_params' parameter of GaussianMixture must be a str among"),
        ({"verbose_interval": 0}, "The 'verbose_interval' parameter"),
        ({"checkpoint": 3}, "The 'checkpoint' parameter"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"precision": "low"}, "The 'precision' parameter of GaussianMixture must be a str among"),
        ({"memory_limit": "1MiB"}, "memory limit 1.0 MiB is too small .* at least"),
        ({"memory_limit": "much"}, "memory_limit must be a size such as"),
        ({"chunk_rows": 0}, "The 'chunk_rows' parameter"),
        ({"sample_rows": 0}, "The 'sample_rows' parameter"),
        ({"sample_rows": 1}, "sample_rows must be at least n_components, 2; got 1"),
        ({"accelerate": "much"}, "The 'accelerate' parameter of GaussianMixture must be a str among"),
        ({"init_params": "k-means||", "algorithm": "stepwise"}, "algorithm 'stepwise' .* init='k-means||'"),
    ],
)
def test_requests_that_cannot_be_met(changes, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"n_components": 2, "device": "cpu", **changes}).fit(X)


@pytest.mark.parametrize("changes", [{"sample_rows": 99}, {"accelerate": "squarem"}, {"init_params": "k-means||"}])
def test_what_the_command_line_has_besides(changes):
    common = {"covariance_type": "diag", "tol": 0.0, "max_iter": 7, "device": "cpu"}
    plain = fitted(GaussianMixture(3, random_state=5, **common))
    ours = fitted(clone(GaussianMixture(3, random_state=5, **common, **changes)))
    assert not np.array_equal(ours.means_, plain.means_)
    asked = {("init" if name == "init_params" else name): value for name, value in changes.items()}
    direct = fit(open_source(X), FitRequest(3, seed=5, precision="highest", **common, **asked))
    assert ours.mixture_.digest == direct.mixture.digest
    assert np.array_equal(ours.to_sklearn().predict(X), ours.predict(X))
    assert ours.to_sklearn().init_params == {"k-means||": "k-means++"}.get(ours.init_params, "kmeans")


def test_use_before_fit_and_wrong_dimension():
    with pytest.raises(NotFittedError):
        GaussianMixture(2).predict(X)
    with pytest.raises(ValueError, match="X has 3 features, but GaussianMixture is expecting 6 features as input"):
        GaussianMixture(2, device="cpu").fit(X).predict(X[:, :3])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_few_rows_one_feature_and_as_many_components_as_rows(kind):
    for x, k in ((X[:2], 1), (X[:9, :1], 2), (X[:5], 5)):
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


def test_few_passes_by_stepwise_em_and_no_warning_for_it():
    x = clustered(60_000, 5, 3).astype(np.float32)
    few = GaussianMixture(5, covariance_type="diag", algorithm="stepwise", random_state=0, device="cpu").fit(x)
    assert few.n_iter_ == 4
    assert not few.converged_
    many = GaussianMixture(5, covariance_type="diag", random_state=0, device="cpu").fit(x)
    assert few.score(x) > many.score(x) - 0.01
    auto = GaussianMixture(5, covariance_type="diag", algorithm="auto", random_state=0, device="cpu").fit(x)
    np.testing.assert_array_equal(auto.means_, few.means_)
    with pytest.raises(ValueError, match="algorithm"):
        GaussianMixture(algorithm="fast").fit(x)
