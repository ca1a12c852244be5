"""``streamgmm prepare``, and fits, predictions and scores of what it makes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.cli.conftest import listing


@pytest.fixture(autouse=True)
def one_line_a_library(recwarn):
    """The command silences libraries' warnings; what they say is no concern here."""


def test_from_raw_vectors_to_labels_of_raw_vectors(here, call):
    facts = call("prepare", "x.npy", "y.zarr", "--steps", "standardise,pca=2", "--shuffle", "--ids", "--json").json
    assert (facts["n_samples"], facts["n_features"], facts["n_dropped"], facts["resumed"]) == (2000, 2, 0, False)
    assert facts["written"] == ["y.zarr", "y.ids.zarr"]
    assert call("fit", "y.zarr", "-k", 3, "--output", "run", "--max-iter", 5).status == 0
    assert call("predict", "run", "y.zarr", "prepared.npy").status == 0
    assert call("predict", "run", "x.npy", "raw.npy").status == 0
    ids = zarr.open_array("y.ids.zarr", mode="r")[:]
    assert np.array_equal(np.load("raw.npy")[ids], np.load("prepared.npy"))
    raw, prepared = (call("score", "run", data, "--json").json["lower_bound"] for data in ("x.npy", "y.zarr"))
    assert raw == pytest.approx(prepared, rel=1e-12)
    info = call("info", "run").stdout
    assert "4 → 2 features (standardise, pca=2), float32" in info


def test_the_same_width_and_the_option(here, call, refused):
    call("prepare", "x.npy", "y.zarr", "--steps", "standardise")
    call("fit", "y.zarr", "-k", 2, "--output", "run", "--max-iter", 3)
    np.save("exported.npy", zarr.open_array("y.zarr", mode="r")[:])
    scores = {
        (data, rows): call("score", "run", data, "--rows", rows, "--json").json["lower_bound"]
        for data, rows in [("y.zarr", "auto"), ("x.npy", "auto"), ("exported.npy", "prepared"), ("exported.npy", "raw")]
    }
    first = scores["y.zarr", "auto"]
    assert scores["x.npy", "auto"] == pytest.approx(first, rel=1e-9)
    assert scores["exported.npy", "prepared"] == pytest.approx(first, rel=1e-12)
    assert scores["exported.npy", "raw"] < first - 0.1
    call("prepare", "x.npy", "z.zarr", "--steps", "l2")
    refused("score", "run", "z.zarr", told=("z.zarr: was prepared in another way", "give the raw vectors"))


def test_what_a_person_sees(here, call):
    bad = np.load("x.npy")
    bad[7] = np.nan
    np.save("x.npy", bad)
    outcome = call("prepare", "x.npy", "y.zarr", "--steps", "drop,l2", "--holdout", "0.1", "--dtype", "float16")
    assert outcome.status == 0, outcome
    for text in (
        "rows ",
        "dropped          1 rows",
        "held out ",
        "4 → 4 features (drop, l2), float16",
        "y.held-out.zarr",
    ):
        assert text in outcome.stdout
    assert (
        "is finished already"
        in call("prepare", "x.npy", "y.zarr", "--steps", "drop,l2", "--holdout", "0.1", "--dtype", "float16").stdout
    )


BAD = [
    (("x.npy", "y.npy"), ("y.npy", "ends in .zarr")),
    (("nowhere.npy", "y.zarr"), ("nowhere.npy",)),
    (("x.npy", "x.zarr"), ("x.zarr: exists",)),
    (("bad.npy", "y.zarr"), ("row 7 of bad.npy: holds NaN or infinity; add the step drop or impute",)),
    (("bad.npy", "y.zarr", "--steps", "pca=2"), ("row 7 of bad.npy: holds NaN",)),
    (("x.npy", "y.zarr", "--steps", "pca=9"), ("step 'pca=9'", "1 to 4 features")),
    (("x.npy", "y.zarr", "--steps", "pac=2"), ("steps must be among",)),
    (("x.npy", "y.zarr", "--columns", "0:9,12"), ("columns: x.npy has 4 features, 0 to 3; got 12",)),
    (("x.npy", "y.zarr", "--columns", "height"), ("columns of an array are numbers", "'height'")),
    (("x.npy", "y.zarr", "--memory", "16MiB"), ("--memory 16.0 MiB is too little", "allow that much")),
    (("x.npy", "y.zarr", "--memory", "lots"), ("memory must be a size",)),
    (("x.npy", "y.zarr", "--holdout", "1"), ("holdout must be a share",)),
    (("x.npy", "y.zarr", "--holdout", "1e-9"), ("holds out none of the 2,000 rows",)),
    (("x.npy", "y.zarr", "--scheduler", "fast"), ("scheduler must be threads, processes or an address",)),
    (("huge.npy", "y.zarr", "--dtype", "float16"), ("row 3 of huge.npy", "a value that float16 cannot")),
    (("all.npy", "y.zarr", "--steps", "drop"), ("all.npy: no row is left",)),
    (("one.npy", "y.zarr", "--steps", "pca=2"), ("needs two rows",)),
    (("x.npy", "x.npy/y.zarr"), ("x.npy/y.zarr.preparing: cannot be used", "name another destination")),
]


@pytest.mark.parametrize(("arguments", "told"), BAD, ids=[" ".join(arguments[:4]) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(here, refused, arguments, told):
    x = np.load("x.npy")
    Path("x.zarr").mkdir()
    for name, value, rows in (("bad", np.nan, 7), ("huge", 1e6, 3), ("all", np.inf, slice(None)), ("one", 1.0, 0)):
        other = x[:1].copy() if name == "one" else x.copy()
        other[rows, 2] = value
        np.save(f"{name}.npy", other)
    before = set(listing(here))
    refused("prepare", *arguments, told=told)
    left = {name for name in set(listing(here)) - before if ".preparing" not in name}
    assert not left


def test_no_room(here, refused, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("streamgmm.prepare.workspace.shutil.disk_usage", lambda path: usage)
    refused("prepare", "x.npy", "y.zarr", told=("bytes are to be written", "1,000 bytes are free; make room"))


def test_a_full_disk_ends_with_status_1_and_goes_on_when_there_is_room(here, call, refused, monkeypatch):
    def full(descriptor, piece):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("streamgmm.prepare.shards.put_all", full)
        refused("prepare", "x.npy", "y.zarr", "--steps", "l2", status=1, told=("No space left on device",))
    assert not Path("y.zarr").exists()
    assert not list(here.rglob("*.tmp"))
    assert call("prepare", "x.npy", "y.zarr", "--steps", "l2").status == 0


def test_info_advises_it(here, call, monkeypatch):
    monkeypatch.setattr("streamgmm.io.advice._PROBE_SECONDS", 0.02)
    np.save("f.npy", np.asfortranarray(np.load("x.npy")))
    monkeypatch.setattr("streamgmm.io.advice._WORTH", 0.0)
    assert "streamgmm prepare" in call("info", "f.npy", "--json").json["advice"]


def test_lists_and_indexes_of_raw_vectors_are_those_of_prepared_ones(here, call):
    call("prepare", "x.npy", "y.zarr", "--steps", "standardise,pca=2")
    call("fit", "y.zarr", "-k", 4, "--output", "run", "--max-iter", 3)
    for data, lists, index in (("x.npy", "of-raw", "raw.faiss"), ("y.zarr", "of-prepared", "prepared.faiss")):
        assert call("assign", "run", data, lists).status == 0
        assert call("index", lists, data, index).status == 0  # the lists know how their rows were prepared
    assert Path("of-raw/transformation.safetensors").exists()
    for name in ("offsets.npy", "ids.npy", "centroids.npy"):
        assert Path("of-raw", name).read_bytes() == Path("of-prepared", name).read_bytes()
    assert Path("raw.faiss").read_bytes() == Path("prepared.faiss").read_bytes()
    np.save("queries.npy", np.load("x.npy")[:50])
    asked = ("queries.npy", "-k", 3, "--seeds", 1, "--iterations", 2, "--no-speed", "--json")
    raw, prepared = (call("evaluate", "run", data, *asked) for data in ("x.npy", "y.zarr"))
    assert raw.status == prepared.status == 0
    assert {**raw.json, "seconds": 0} == {**prepared.json, "seconds": 0}
