"""``fit(dask_array)``: each partition computed once, where Dask computes, to the result of the same rows in memory."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import dask.array
import numpy as np
import pytest

from streamgmm import GaussianMixture, KMeans, open_source
from streamgmm.errors import DataError
from streamgmm.prepare.spilling import SpilledSource
from tests.oracles import clustered


@pytest.fixture
def x(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return clustered(3000, 3, 4).astype(np.float32)


def noting(x, path, rows=700):
    """The array, and a folder with a file for each time that a partition is computed."""

    def note(block):
        descriptor, _ = tempfile.mkstemp(prefix=f"{os.getpid()}-", dir=path)
        os.close(descriptor)
        return block

    path.mkdir()
    return dask.array.from_array(x, chunks=(rows, 2)).rechunk((rows, 4)).map_blocks(note, dtype=x.dtype, meta=x[:0])


@pytest.mark.parametrize(
    "kind", [lambda: GaussianMixture(3, random_state=0, max_iter=20), lambda: KMeans(3, random_state=0)]
)
def test_each_partition_is_computed_once(x, tmp_path, kind):
    array = noting(x, tmp_path / "noted")
    found, expected = kind().fit(array), kind().fit(open_source(x))
    assert len(list((tmp_path / "noted").iterdir())) == 5
    for name in ("means_", "cluster_centers_"):
        if hasattr(expected, name):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert not list(tmp_path.glob("streamgmm-dask-*"))


def test_rows_and_identity_are_the_array_s(x):
    array = dask.array.from_array(x, chunks=((0, 1000, 2000), 4))
    source = SpilledSource(array)
    assert source.read_path == "extents"
    assert source.read(0, 3000).tobytes() == x.tobytes()
    assert source.fingerprint == open_source(array).fingerprint
    assert source.locate(1500) == "row 1500 of dask array"
    source.close()


@pytest.mark.long
def test_on_the_workers_of_a_client(x, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        warnings.catch_warnings(action="ignore"),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        source = SpilledSource(noting(x, tmp_path / "noted"))
        assert source.read(0, 3000).tobytes() == x.tobytes()
        source.close()
    assert {name.name.split("-")[0] for name in (tmp_path / "noted").iterdir()} != {str(os.getpid())}


def test_what_goes_wrong(x, tmp_path, monkeypatch):
    def broken(block):
        raise OverflowError("broken")

    array = dask.array.from_array(x, chunks=(700, 4))
    with pytest.raises(DataError, match=r"a partition cannot be computed \(OverflowError: broken\)"):
        SpilledSource(array.map_blocks(broken, dtype=x.dtype, meta=x[:0]))
    with pytest.raises(DataError, match="call compute_chunk_sizes"):
        SpilledSource(array.map_blocks(lambda block: block[:-1], dtype=x.dtype, meta=x[:0]))
    with monkeypatch.context() as patch:
        patch.setattr("streamgmm.prepare.spilling.staged_path", lambda folder, index: Path(folder, "elsewhere"))
        with pytest.raises(DataError, match="cannot be seen here; name a folder that all share in TMPDIR"):
            SpilledSource(array)
    usage = type("usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr("streamgmm.prepare.spilling.shutil.disk_usage", lambda path: usage)
        with pytest.raises(DataError, match=r"take 46\.9 KiB and 10 B are free; make room"):
            SpilledSource(array)
    assert not list(tmp_path.glob("streamgmm-dask-*"))
