"""The transformation goes with the rows into the model, and from there to raw vectors."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DamagedFileError, DataError, RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources.transformed import TransformedSource, as_fitted
from streamgmm.mixture import Mixture, load_model, load_transformation
from streamgmm.prepare import prepare
from streamgmm.request import FitRequest
from streamgmm.storage import load_tensors, save_tensors
from streamgmm.transforms import Fill, Linear, Normalise, Scale, Select, Transformation, granule_rows
from tests.oracles import clustered


@pytest.fixture
def transformation():
    rng = np.random.default_rng(0)
    maps = (
        Select(np.array([4, 0, 2])),
        Fill(np.arange(3.0)),
        Normalise(),
        Scale(rng.normal(size=3), rng.random(3) + 0.5),
        Linear(rng.normal(size=3), rng.normal(size=(3, 2))),
    )
    return Transformation(5, maps, np.dtype(np.int8), 0.03, ("l2", "pca=2"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("raw.npy", clustered(5000, 3, 6, spread=4.0).astype(np.float32))
    return tmp_path


def test_saved_and_loaded(transformation, tmp_path):
    transformation.save(tmp_path / "t")
    again = Transformation.load(tmp_path / "t")
    assert again.digest == transformation.digest
    x = np.random.default_rng(1).normal(size=(100, 5)).astype(np.float32)
    assert again.apply(x).tobytes() == transformation.apply(x).tobytes()
    assert again.describe() == "5 → 2 features (l2, pca=2), int8"


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, tensors: facts.update(maps=["fill"]),
        lambda facts, tensors: facts.update(maps=["unheard of"]),
        lambda facts, tensors: facts.update(version=2),
        lambda facts, tensors: facts.update(n_features_out=7),
        lambda facts, tensors: facts.update(dtype="nonsense"),
        lambda facts, tensors: tensors.pop("4.matrix"),
    ],
)
def test_a_file_that_is_none(transformation, tmp_path, change):
    facts, tensors = dict(transformation.facts), transformation.tensors()
    change(facts, tensors)
    save_tensors(tmp_path / "t", tensors, facts)
    with pytest.raises(DamagedFileError, match="holds no usable transformation"):
        Transformation.load(tmp_path / "t")


def test_rows_are_read_with_the_same_bits_in_any_piece(transformation):
    x = np.random.default_rng(1).normal(size=(3 * granule_rows(5) + 77, 5))
    whole = transformation.apply(x)
    source = TransformedSource(open_source(x), transformation)
    for start, stop in [(0, len(x)), (1, 2), (4000, 4100), (4095, 12289), (len(x) - 1, len(x))]:
        assert source.read(start, stop).tobytes() == whole[start:stop].tobytes()


def test_threads_of_blas_change_no_bit():
    """At 1,024 × 768 × 255 a product by two threads has other bits than by one, and half of its rows alone too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2500, 768))
    wide = Transformation(768, (Linear(np.zeros(768), rng.normal(size=(768, 255))),), np.dtype(np.float64))
    with threadpool_limits(2):
        whole = wide.apply(x)
        read = TransformedSource(open_source(x), wide).read(700, 2100)
        with threadpool_limits(1):
            assert wide.apply(x).tobytes() == whole.tobytes()
        assert {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"} == {2}
    assert read.tobytes() == whole[700:2100].tobytes()


def test_what_no_integer_stands_for_is_told(transformation):
    x = np.ones((50, 5))
    x[33, 0] = np.nan
    filled = TransformedSource(open_source(x), transformation)
    filled.read(0, 50)
    bare = Transformation(5, (), np.dtype(np.int8), 0.1)
    with pytest.raises(DataError, match="row 33 of array: is not finite"):
        TransformedSource(open_source(x), bare).read(0, 50)


def fitted(data, **settings):
    request = FitRequest(n_components=3, max_iter=3, device="cpu", **settings)
    return fit(open_source(data), request, settings.get("output"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_model_of_prepared_rows_takes_raw_ones(here, dtype):
    prepare("raw.npy", "p.zarr", "standardise,pca=3", dtype=dtype, shuffle=True, ids=True)
    request = FitRequest(n_components=(2, 3), max_iter=3, device="cpu")
    fit(open_source("p.zarr"), request, here / "run")
    transformation = load_transformation("run")
    assert transformation is not None
    assert transformation.digest == open_source("p.zarr").transformation.digest
    assert load_transformation("run/models/2.safetensors").digest == transformation.digest
    assert load_model("run")[0].n_features == 3
    ids = open_source("p.zarr").read(0, 5000), np.load("raw.npy")
    raw = as_fitted(open_source("raw.npy"), transformation)
    assert isinstance(raw, TransformedSource)
    import zarr

    order = zarr.open_array("p.ids.zarr", mode="r")[:]
    assert raw.read(0, 5000)[order].tobytes() == ids[0].tobytes()
    estimator = GaussianMixture.load("run")
    estimator.save("copy.safetensors")
    GaussianMixture(2, max_iter=0, device="cpu").fit("p.zarr").save("own.safetensors")
    for name in ("copy", "own"):
        assert load_transformation(f"{name}.safetensors").digest == transformation.digest
    assert np.array_equal(estimator.predict(raw)[order], estimator.predict("p.zarr"))


def test_the_digest_of_a_model_is_that_of_its_parameters(here, transformation):
    mixture = Mixture(np.ones(1), np.zeros((1, 2)), np.ones((1, 2)), "diag")
    mixture.save("plain.safetensors")
    mixture.save("with.safetensors", transformation)
    assert Mixture.load("plain.safetensors").digest == Mixture.load("with.safetensors").digest == mixture.digest
    assert load_transformation("plain.safetensors") is None
    assert load_transformation("with.safetensors").digest == transformation.digest
    tensors, metadata = load_tensors(here / "with.safetensors")
    tensors.pop("transformation.4.matrix")
    save_tensors(here / "broken.safetensors", tensors, metadata)
    with pytest.raises(DamagedFileError, match="holds no usable transformation"):
        load_transformation("broken.safetensors")


def test_who_is_raw_and_who_is_prepared(here):
    prepare("raw.npy", "p.zarr", "standardise")
    prepare("raw.npy", "q.zarr", "pca=3")
    prepare("raw.npy", "s.zarr", shuffle=True)
    same, fewer, none = (open_source(f"{name}.zarr").transformation for name in "pqs")
    raw, narrow, odd = open_source("raw.npy"), open_source(np.zeros((4, 3))), open_source(np.zeros((4, 4)))
    # A model of raw rows takes everything as it is.
    assert as_fitted(raw, None) is raw
    # As wide as raw: raw, unless it says itself, or somebody says, that it is prepared.
    assert isinstance(as_fitted(raw, same), TransformedSource)
    assert as_fitted(raw, same, "prepared") is raw
    assert not isinstance(as_fitted(open_source("p.zarr"), same), TransformedSource)
    assert isinstance(as_fitted(open_source("p.zarr"), same, "raw"), TransformedSource)
    # As wide as prepared.
    assert as_fitted(narrow, fewer) is narrow
    # Nothing is computed where only the order changed.
    assert as_fitted(raw, none) is raw
    with pytest.raises(DataError, match="has 4 features; the model takes raw vectors of 6 or prepared ones of 3"):
        as_fitted(odd, fewer)
    with pytest.raises(DataError, match="was prepared in another way"):
        as_fitted(open_source("q.zarr"), same)
    with pytest.raises(RequestError, match="rows must be one of auto, raw, prepared"):
        as_fitted(raw, same, "cooked")
    with pytest.raises(DataError, match="was prepared in another way than"):
        open_source([open_source("p.zarr"), raw])


def test_prepared_rows_are_not_prepared_again(here):
    prepare("raw.npy", "p.zarr", "standardise")
    with pytest.raises(DataError, match="was prepared already; prepare what it was made from"):
        prepare("p.zarr", "q.zarr", "l2")
