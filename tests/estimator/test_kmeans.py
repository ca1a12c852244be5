"""`KMeans` against scikit-learn's, and against brute force."""

from __future__ import annotations

import pickle
import warnings

import dask.array
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.cluster import KMeans as Peer
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from streamgmm import KMeans
from streamgmm.errors import DataError, RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources import open_source
from streamgmm.request import FitRequest
from tests.oracles import clustered

X = clustered(4000, 5, 6, spread=1.5)
FIRST = X[:5]
LARGE = clustered(9001, 3, 2, spread=1.0).astype(np.float32)
"""More rows than a granule, so that it can be cut."""


def ours(k: int = 5, **parameters) -> KMeans:
    return KMeans(k, **{"random_state": 0, "device": "cpu", **parameters})


def squared(x, centres) -> np.ndarray:
    """Squared distances (N, K) from the differences, fp64."""
    x, centres = (np.asarray(a, dtype=np.float64) for a in (x, centres))
    return ((x[:, None] - centres[None]) ** 2).sum(2)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2])
def test_from_the_same_centres_it_is_scikit_learns(dtype, tol):
    found = ours(init=FIRST, n_init=1, tol=tol).fit(X.astype(dtype))
    peer = Peer(5, init=FIRST, n_init=1, tol=tol, algorithm="lloyd").fit(X.astype(dtype))
    assert np.array_equal(found.labels_, peer.labels_)
    np.testing.assert_allclose(found.cluster_centers_, peer.cluster_centers_, atol=1e-4)
    assert np.isclose(found.inertia_, peer.inertia_, rtol=1e-6)
    assert found.n_iter_ == peer.n_iter_
    for name in ("cluster_centers_", "labels_"):
        assert getattr(found, name).dtype == getattr(peer, name).dtype
        assert getattr(found, name).shape == getattr(peer, name).shape


def test_one_iteration_is_lloyds():
    found = ours(init=FIRST, max_iter=1).fit(X)
    labels = squared(X, FIRST).argmin(1)
    centres = np.stack([X[labels == k].mean(0) for k in range(5)])
    np.testing.assert_allclose(found.cluster_centers_, centres)
    assert np.array_equal(found.labels_, squared(X, centres).argmin(1))
    assert found.n_iter_ == 1


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_its_own_starts_are_as_good_as_scikit_learns(init):
    def best(estimator):
        return estimator.set_params(init=init, n_init=10, random_state=0).fit(X[:1000]).inertia_

    assert np.isclose(best(ours()), best(Peer(5)), rtol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_distances_do_not_cancel_far_from_the_origin(offset):
    x = (X + offset).astype(np.float32)
    found = ours().fit(x)
    exact = squared(x, found.cluster_centers_)
    assert np.isclose(found.inertia_, exact.min(1).sum(), rtol=1e-12)
    assert np.isclose(found.score(x), -found.inertia_, rtol=1e-12)
    assert np.array_equal(found.predict(x), found.labels_)
    chosen = exact[np.arange(len(x)), found.labels_]
    np.testing.assert_allclose(chosen, exact.min(1), rtol=1e-5)
    np.testing.assert_allclose(found.transform(x), np.sqrt(exact), rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 7),
    d=st.integers(1, 5),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_distances_of_any_shape_and_scale(n, k, d, scale, seed):
    rng = np.random.default_rng(seed)
    fitted = ours(1).fit(np.zeros((1, d)))
    fitted.cluster_centers_ = rng.normal(size=(k, d)) * scale
    # Rows far away, near, and on top of centres.
    x = np.concatenate([rng.normal(size=(n, d)) * scale, fitted.cluster_centers_, fitted.cluster_centers_ * (1 + 1e-9)])
    exact = squared(x, fitted.cluster_centers_)
    np.testing.assert_allclose(fitted.transform(x), np.sqrt(exact), rtol=1e-9)
    assert np.array_equal(fitted.transform(fitted.cluster_centers_).diagonal(), np.zeros(k))
    assert np.array_equal(fitted.predict(fitted.cluster_centers_), np.arange(k))
    assert np.isclose(-fitted.score(x), exact.min(1).sum(), rtol=1e-9)


@pytest.mark.parametrize("changed", [{"chunk_rows": 1}, {"chunk_rows": 5000}, {"memory_limit": "48MiB"}])
def test_chunks_and_memory_limits_change_no_bit(changed):
    whole, cut = (ours(3, **parameters).fit(LARGE) for parameters in ({}, changed))
    assert cut.inertia_ == whole.inertia_
    assert cut.score(LARGE) == whole.score(LARGE)
    for name in ("cluster_centers_", "labels_"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name))
    assert np.array_equal(cut.transform(LARGE), whole.transform(LARGE))


def forms(tmp_path) -> dict[str, object]:
    """The same rows as everything that ``fit`` takes; the first three are in memory."""
    x = X.astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    stored = zarr.create_array(tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(512, 6), shards=(1024, 6))
    stored[:] = x
    return {
        "array": x,
        "list": x.tolist(),
        "frame": pd.DataFrame(x),
        "path": tmp_path / "x.npy",
        "list of arrays": [x[:1500], x[1500:]],
        "memmap": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "torch": torch.from_numpy(x),
        "zarr": stored,
        "dask": dask.array.from_array(x, chunks=(700, 6)),
    }


def test_every_form_of_data(tmp_path):
    data = forms(tmp_path)
    expected = ours(max_iter=5).fit(data["array"])
    for i, (name, x) in enumerate(data.items()):
        found = ours(max_iter=5).fit(x)
        if name == "list":  # of Python's numbers, which are float64
            np.testing.assert_allclose(found.cluster_centers_, expected.cluster_centers_, rtol=1e-5)
        else:
            assert found.cluster_centers_.tobytes() == expected.cluster_centers_.tobytes(), name
        assert np.array_equal(found.predict(x), expected.labels_)
        assert hasattr(found, "labels_") == (i < 3), name
    found = ours(max_iter=5).fit(piece for piece in (data["array"][:1500], data["array"][1500:]))
    assert found.cluster_centers_.tobytes() == expected.cluster_centers_.tobytes()


def test_labels_of_streamed_data_are_kept_on_request(tmp_path):
    np.save(tmp_path / "x.npy", X)
    found = ours().fit(tmp_path / "x.npy")
    with pytest.raises(AttributeError, match="set compute_labels=True, or call predict"):
        _ = found.labels_
    assert found.inertia_ == ours().fit(X).inertia_
    assert np.array_equal(ours(compute_labels=True).fit(tmp_path / "x.npy").labels_, found.predict(X))
    assert not hasattr(ours(compute_labels=False).fit(X), "labels_")
    assert np.array_equal(ours().fit_predict(tmp_path / "x.npy"), found.predict(X))
    found.fit(X)
    assert len(found.labels_) == len(X)
    found.fit(tmp_path / "x.npy")  # whose labels those are not
    assert not hasattr(found, "labels_")


def test_weights_repeat_rows(tmp_path):
    counts = np.random.default_rng(0).integers(0, 4, len(X))
    weighted = ours(init=FIRST).fit(X, sample_weight=counts)
    repeated = ours(init=FIRST).fit(np.repeat(X, counts, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_)
    assert np.array_equal(np.repeat(weighted.labels_, counts), repeated.labels_)
    assert np.isclose(weighted.inertia_, repeated.inertia_)
    assert weighted.score(X, sample_weight=counts) == -weighted.inertia_
    np.save(tmp_path / "w.npy", counts.astype(np.float64))
    from_file = ours(init=FIRST).fit(X, sample_weight=tmp_path / "w.npy")
    assert np.array_equal(from_file.cluster_centers_, weighted.cluster_centers_)


@pytest.mark.parametrize("factor", [0.5, 1e-6, 1e6])
def test_scaled_weights_change_nothing_but_the_inertia(factor):
    weights = np.random.default_rng(0).uniform(size=len(X))
    plain, scaled = (ours().fit(X, sample_weight=weights * f) for f in (1, factor))
    assert np.array_equal(plain.labels_, scaled.labels_)
    np.testing.assert_allclose(plain.cluster_centers_, scaled.cluster_centers_)
    assert np.isclose(scaled.inertia_, plain.inertia_ * factor)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_clusters": len(X) + 1}, r"n_samples=4000 should be >= n_clusters=4001\."),
        ({"init": X[:2]}, r"The shape of the initial centers \(2, 6\) does not match the number of clusters 5\."),
        (
            {"init": X[:5, :2]},
            r"The shape of the initial centers \(5, 2\) does not match the number of features of the data 6\.",
        ),
        ({"init": np.full((5, 6), np.nan)}, "NaN"),
        ({"init": "kmeans"}, "'init' parameter of KMeans must be a str among"),
        ({"max_iter": 0}, "'max_iter' parameter of KMeans must be an int"),
        ({"sample_rows": 4}, "sample_rows must be at least n_components, 5; got 4"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"memory_limit": "1MiB"}, r"memory limit 1\.0 MiB is too small"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        ours(**{"k": 5, **parameters}).fit(X) if "n_clusters" not in parameters else KMeans(**parameters).fit(X)


def test_rows_that_are_not_finite_are_named(tmp_path):
    x = X.copy()
    x[1234, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        ours().fit(x)
    with pytest.raises(DataError, match=r"row 1234 of .*x\.npy: column 2 is nan"):
        ours().fit(tmp_path / "x.npy")
    found = ours().fit(X)
    for method in (found.predict, found.transform, found.score):
        with pytest.raises(DataError, match=r"row 1234 of .*x\.npy: column 2 is nan"):
            method(tmp_path / "x.npy")


def test_before_fit_and_for_other_features():
    for name in ("predict", "transform", "score"):
        with pytest.raises(NotFittedError):
            getattr(ours(), name)(X)
        with pytest.raises(ValueError, match="X has 4 features, but KMeans is expecting 6 features"):
            getattr(ours().fit(X), name)(X[:, :4])
    with pytest.raises(RequestError, match="sample_weight must have one value a row"):
        ours().fit(torch.from_numpy(X), sample_weight=torch.ones(3))


def test_given_centres_are_one_start_and_are_not_touched():
    given_centres = FIRST.copy()
    with pytest.warns(
        RuntimeWarning, match="Explicit initial center position passed: performing only one init"
    ) as seen:
        found = ours(init=given_centres, n_init=10).fit(X)
    assert seen[0].filename == __file__
    assert np.array_equal(given_centres, FIRST)
    assert np.array_equal(found.cluster_centers_, ours(init=FIRST.tolist()).fit(X).cluster_centers_)


@pytest.mark.parametrize("changes", [{"sample_rows": 50}, {"init": "k-means||"}])
def test_what_the_command_line_has_besides(changes):
    found = clone(ours(max_iter=1, **changes))
    assert not np.array_equal(found.fit(X).cluster_centers_, ours(max_iter=1).fit(X).cluster_centers_)
    asked = {"n_components": 5, "covariance_type": "spherical", "model": "kmeans", "collapse": "reseed", "tol": 1e-4}
    request = FitRequest(**asked, max_iter=1, precision="highest", device="cpu", **{"init": "k-means++", **changes})
    assert np.array_equal(found.cluster_centers_, fit(open_source(X), request).mixture.means)


@pytest.mark.parametrize(("init", "expected"), [("k-means++", 1), ("random", 10), (FIRST, 1)])
def test_auto_number_of_starts(init, expected, capsys):
    ours(init=init, max_iter=1, verbose=1).fit(X)
    assert capsys.readouterr().out.count("Initialization complete") == expected


@pytest.mark.parametrize(("tol", "ending"), [(0, "strict convergence."), (1e-2, "center shift within tolerance 0.01.")])
@pytest.mark.parametrize("weight", [None, 2.0])
def test_verbose_tells_the_inertia(tol, ending, weight, capsys):
    weights = None if weight is None else np.full(len(X), weight)
    found = ours(tol=tol, verbose=1).fit(X, sample_weight=weights)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Initialization complete"
    assert lines[-1] == f"Converged at iteration {found.n_iter_ - 1}: {ending}"
    inertias = [float(line.split()[-1].rstrip(".")) for line in lines[1:-1]]
    assert len(inertias) == found.n_iter_
    assert inertias == sorted(inertias, reverse=True)
    assert np.isclose(inertias[-1], found.inertia_, rtol=1e-2)
    assert not np.isclose(inertias[-1] * 2, found.inertia_, rtol=0.5)
    ours(tol=tol).fit(X)
    assert capsys.readouterr().out == ""


def test_more_clusters_than_distinct_rows():
    x = np.repeat([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], 4, axis=0)
    message = r"Number of distinct clusters \(3\) found smaller than n_clusters \(4\). Possibly due to duplicate points"
    with pytest.warns(ConvergenceWarning, match=message) as seen:
        found = ours(4).fit(x)
    assert found.n_iter_ <= 3
    assert seen[0].filename == __file__
    assert found.inertia_ == 0
    assert len(set(found.labels_)) == 3


def test_constant_rows():
    found = ours(1).fit(np.full((20, 3), 7.0))
    assert np.array_equal(found.cluster_centers_, [[7.0] * 3])
    assert found.inertia_ == 0


def test_empty_clusters_are_relocated():
    x = np.array([[0, 0], [0.5, 0], [0.5, 1], [1, 1]])
    found = ours(2, init=[[0.5, 0.5], [3, 3]]).fit(x)
    assert np.isclose(found.inertia_, 0.25)
    assert sorted(found.cluster_centers_.tolist()) == [[0.25, 0.0], [0.75, 1.0]]
    found = ours(2, init=[[-1], [10]]).fit([[-1], [1]], sample_weight=[1.9, 0.1])
    assert np.array_equal(found.cluster_centers_, [[-1], [1]])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_integers_become_float64(dtype):
    x = np.array([[0, 0], [10, 10], [12, 9], [1, 1], [2, 0], [8, 10]], dtype=dtype)
    found = ours(2).fit(x)
    assert found.cluster_centers_.dtype == np.float64
    assert found.transform(x).dtype == np.float64
    assert len({tuple(found.labels_[[0, 3, 4]]), tuple(found.labels_[[1, 2, 5]])}) == 2
    assert found.fit(x.astype(np.float32)).transform(x.astype(np.float32)).dtype == np.float32


def test_clone_pickle_and_fit_transform():
    found = ours().fit(X)
    assert clone(found).get_params() == found.get_params()
    restored = pickle.loads(pickle.dumps(found))
    assert np.array_equal(restored.predict(X), found.labels_)
    assert np.array_equal(restored.labels_, found.labels_)
    assert np.array_equal(ours().fit_transform(X), found.transform(X))
    assert np.array_equal(ours().fit_predict(X), found.labels_)
    found.cluster_centers_.flags.writeable = False
    assert np.array_equal(found.predict(X), found.labels_)


def test_names_in_and_out():
    frame = pd.DataFrame(X, columns=list("abcdef"))
    found = ours().set_output(transform="pandas").fit(frame)
    assert list(found.feature_names_in_) == list("abcdef")
    assert list(found.get_feature_names_out()) == [f"kmeans{i}" for i in range(5)]
    assert list(found.transform(frame).columns) == [f"kmeans{i}" for i in range(5)]
    with pytest.raises(ValueError, match="feature names should match"):
        found.predict(frame.rename(columns={"a": "z"}))


def test_in_pipelines_and_searches():
    y = X[:, 0] > 0
    pipeline = make_pipeline(StandardScaler(), ours(), LogisticRegression())
    assert pipeline.fit(X, y).score(X, y) > 0.7
    search = GridSearchCV(ours(), {"n_clusters": [1, 5]}, cv=2).fit(X)
    assert search.best_params_ == {"n_clusters": 5}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole = ours(init=FIRST, tol=0.0).fit(X)
    stopped = ours(init=FIRST, tol=0.0, max_iter=2, checkpoint=tmp_path / "run").fit(X)
    assert stopped.n_iter_ == 2
    resumed = ours(init=FIRST, tol=0.0, checkpoint=tmp_path / "run").fit(X)
    again = ours(init=FIRST, tol=0.0, checkpoint=tmp_path / "run").fit(X)
    for found in (resumed, again):
        assert found.n_iter_ == whole.n_iter_ > 2
        assert found.inertia_ == whole.inertia_
        assert np.array_equal(found.cluster_centers_, whole.cluster_centers_)


def test_more_iterations_do_not_raise_the_inertia():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reaching max_iter is no reason to warn, as in scikit-learn
        inertias = [ours(max_iter=n, tol=0.0).fit(X).inertia_ for n in (1, 2, 4, 8, 300)]
    assert inertias == sorted(inertias, reverse=True)
