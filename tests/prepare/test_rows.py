"""Every row comes out where it should, with the bits that a straight computation gives it."""

from __future__ import annotations

from pathlib import Path

import dask.array
import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgmm import open_source
from streamgmm.prepare import prepare
from streamgmm.weighting import Weighting
from tests.prepare.conftest import contents, raw_rows


def read(path):
    """All rows, by zarr itself."""
    return zarr.open_array(path, mode="r")[:]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint8"])
def test_without_steps_rows_are_copied_as_they_are(here, dtype):
    x = raw_rows().astype(dtype)
    np.save("t.npy", x)
    prepare("t.npy", "t.zarr", shard_size="16KiB")
    assert read("t.zarr").dtype == dtype
    assert read("t.zarr").tobytes() == x.tobytes()
    source = open_source("t.zarr")
    assert source.read_path == "extents"
    assert source.read(0, len(x)).tobytes() == x.tobytes()


def test_the_straight_computation(here, small_granules):
    x = raw_rows().astype(np.float64)
    transformation = prepare("x.npy", "y.zarr", "standardise", columns="6,0:3", shard_size="4KiB").transformation
    _, scale = transformation.maps
    straight = ((x[:, [6, 0, 1, 2]] - scale.centre) / scale.scale).astype(np.float32)
    assert read("y.zarr").tobytes() == straight.tobytes()
    np.testing.assert_allclose(scale.centre, x[:, [6, 0, 1, 2]].mean(axis=0), rtol=1e-13)


def write_hdf5(x):
    with h5py.File("s.h5", "w") as file:
        file["x"] = x
    return "s.h5::x"


def write_arrow(x):
    values = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    table = pa.table({"x": values})
    with pa.OSFile("s.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    return "s.arrow"


def write_fbin(x):
    with Path("s.fbin").open("wb") as file:
        file.write(np.array(x.shape, "<u4").tobytes() + x.tobytes())
    return "s.fbin"


def write_zarr(x):
    zarr.create_array("s.zarr", shape=x.shape, dtype=x.dtype, chunks=(100, 3))[:] = x
    return "s.zarr"


SOURCES = {
    "npy": lambda x: "x.npy",
    "several": lambda x: ["x.npy"],
    "fbin": write_fbin,
    "hdf5": write_hdf5,
    "arrow": write_arrow,
    "zarr, compressed": write_zarr,
    "zarr.Array": lambda x: zarr.open_array(write_zarr(x), mode="r"),
    "array": lambda x: x,
    "torch": torch.from_numpy,
    "source": open_source,
    "dask": lambda x: dask.array.from_array(x, chunks=(700, 3)),
    "dask, one row a chunk at the end": lambda x: dask.array.from_array(x, chunks=((3000, 1), 8)),
    "dask, unknown chunks": lambda x: dask.array.from_array(x, chunks=(700, 8))[
        dask.array.from_array(x[:, 0] < 1e9, 700)
    ],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_bytes(here, kind, small_granules):
    x = raw_rows()
    prepare("x.npy", "expected.zarr", "drop,pca=3", shuffle=True, holdout=0.2, ids=True, shard_size="4KiB")
    data = SOURCES[kind](x)
    prepare(data, "y.zarr", "drop,pca=3", shuffle=True, holdout=0.2, ids=True, shard_size="4KiB")
    found = contents(here)
    ours = {name.replace("y.", "expected.", 1): value for name, value in found.items() if name.startswith("y.")}
    assert ours == {name: value for name, value in found.items() if name.startswith("expected.")}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("memory", ["400MiB", "4GiB"])
def test_workers_and_memory_change_nothing(here, small_granules, workers, memory, monkeypatch):
    steps = {"steps": "l2,standardise", "shuffle": True, "holdout": 0.1, "ids": True, "shard_size": "8KiB"}
    prepare("x.npy", "a.zarr", **steps)
    before = {name[2:]: value for name, value in contents(here).items()}
    monkeypatch.setattr("streamgmm.prepare.memory.RUN_BYTES", 1 << 14)
    monkeypatch.setattr("streamgmm.prepare.preparation.RUN_BYTES", 1 << 14)
    prepare("x.npy", "b.zarr", **steps, workers=workers, memory=memory)
    after = {name[2:]: value for name, value in contents(here).items() if name.startswith("b.")}
    assert after == before


def test_a_shuffle_is_a_permutation_told_by_its_seed(here):
    x = raw_rows()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare("x.npy", f"{name}.zarr", shuffle=True, seed=seed, ids=True, shard_size="8KiB")
    ids = {name: read(f"{name}.ids.zarr") for name in "abc"}
    assert sorted(ids["a"]) == list(range(len(x)))
    assert np.array_equal(ids["a"], ids["b"])
    assert (ids["a"] == ids["c"]).mean() < 0.01
    assert read("a.zarr").tobytes() == x[ids["a"]].tobytes()
    assert abs(np.corrcoef(ids["a"][:-1], ids["a"][1:])[0, 1]) < 0.1


def test_the_rows_held_out_are_those_that_fit_would_hold_out(here):
    x = raw_rows()
    prepare("x.npy", "y.zarr", holdout=0.3, seed=4)
    held = Weighting(holdout=0.3, seed=4).held_out(np.arange(len(x)))
    assert read("y.zarr").tobytes() == x[~held].tobytes()
    assert read("y.held-out.zarr").tobytes() == x[held].tobytes()


def test_rows_that_are_not_finite_are_dropped(here, small_granules):
    x = raw_rows()
    bad = np.random.default_rng(0).random(len(x)) < 0.3
    bad[:200] = True
    x[bad, 3] = np.inf
    np.save("bad.npy", x)
    found = prepare("bad.npy", "y.zarr", "drop", ids=True, shard_size="4KiB")
    assert found.facts["n_dropped"] == bad.sum()
    assert read("y.zarr").tobytes() == x[~bad].tobytes()
    assert np.array_equal(read("y.ids.zarr"), np.flatnonzero(~bad))
    prepare("bad.npy", "z.zarr", "drop", columns="0:3")
    assert read("z.zarr").tobytes() == x[:, :3].tobytes()


STEPS = ["drop", "impute=mean", "impute=0.5", "l2", "standardise", "pca=3", "whiten=2", "project=4"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sampled_from(STEPS), max_size=4, unique=True),
    shuffle=st.booleans(),
    holdout=st.sampled_from([0.0, 0.25]),
    columns=st.sampled_from(["", "1:7", "5,0,3,2"]),
    dtype=st.sampled_from([None, "float64", "float32", "float16", "int8"]),
    shard=st.sampled_from(["1KiB", "4KiB", "64MiB"]),
    holes=st.booleans(),
    n=st.sampled_from([65, 511, 1300]),
)
def test_any_combination(here, small_granules, steps, shuffle, holdout, columns, dtype, shard, holes, n):
    """Each output row is its raw row, transformed; each raw row is in one output, or dropped for a reason."""
    x = raw_rows(n)
    if holes:
        x[::5, 2] = np.nan
        steps = ["drop", *(step for step in steps if step != "drop")]
    wide = [step for step in steps if step[-2:] not in ("=3", "=2", "=4")]
    narrow = sorted((step for step in steps if step not in wide), key=lambda step: -int(step[-1]))
    if narrow[1:] and holes:
        narrow = narrow[:1]
    np.save("h.npy", x)
    prepare(
        "h.npy",
        "h.zarr",
        [*wide, *narrow],
        shuffle=shuffle,
        holdout=holdout,
        columns=columns,
        dtype=dtype,
        ids=True,
        shard_size=shard,
        fresh=True,
    )
    source = open_source("h.zarr")
    every = source.transformation.apply(x)
    ids = read("h.ids.zarr")
    assert read("h.zarr").tobytes() == every[ids].tobytes()
    assert source.read(0, len(ids)).tobytes() == every[ids].tobytes()
    held = np.empty(0, np.int64)
    if holdout:
        held = read("h.held-out.ids.zarr")
        assert read("h.held-out.zarr").tobytes() == every[held].tobytes()
    columns_used = {"": range(8), "1:7": range(1, 7), "5,0,3,2": [5, 0, 3, 2]}[columns]
    kept = np.isfinite(x[:, list(columns_used)]).all(axis=1) if "drop" in steps else np.ones(n, bool)
    assert sorted([*ids, *held]) == np.flatnonzero(kept).tolist()
