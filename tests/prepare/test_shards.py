"""The files: what zarr-python and zarrs read, what a loader likes, and what damage does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import dask.array
import numpy as np
import pytest
import zarr

from streamgmm import open_source
from streamgmm.errors import DamagedFileError, DataError
from streamgmm.prepare import prepare
from streamgmm.prepare.shards import Layout, digest_of
from streamgmm.statistics import BLOCK_ROWS
from tests.prepare.conftest import raw_rows


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 3001])
def test_zarr_and_zarrs_read_what_we_write(here, n):
    x = raw_rows(n)
    np.save("n.npy", x)
    prepare("n.npy", "y.zarr", shard_size="2KiB", ids=True)
    assert zarr.open_array("y.zarr", mode="r")[:].tobytes() == x.tobytes()
    assert np.array_equal(zarr.open_array("y.ids.zarr", mode="r")[:], np.arange(n))
    pytest.importorskip("zarrs")
    with warnings.catch_warnings(action="ignore"), zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        assert zarr.open_array("y.zarr", mode="r")[:].tobytes() == x.tobytes()


def test_our_bytes_are_those_that_zarr_writes(here):
    x = raw_rows(300)
    np.save("n.npy", x)
    prepare("n.npy", "y.zarr", shard_size="4KiB")
    theirs = zarr.create_array(
        "z.zarr",
        shape=x.shape,
        dtype=x.dtype,
        chunks=(128, 8),
        shards=(128, 8),
        compressors=[zarr.codecs.Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    theirs[:] = x
    for shard in range(3):
        assert Path(f"y.zarr/c/{shard}/0").read_bytes() == Path(f"z.zarr/c/{shard}/0").read_bytes()


@pytest.mark.parametrize("d", [1, 3, 64, 128, 768, 4096, 100_000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_loaders_chunks_are_whole_inner_chunks(d, dtype):
    layout = Layout.of((10**9, d), dtype, 64 << 20)
    assert BLOCK_ROWS % layout.chunk_rows == 0
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.chunk_rows == 1 or layout.chunk_rows * layout.row_bytes <= 1 << 20
    assert layout.shard_rows * layout.row_bytes <= 64 << 20


def test_shards_larger_than_dask_chunks(here):
    """Where `dask.array.to_zarr` corrupts rows: several tasks write parts of one shard."""
    x = raw_rows()
    prepare(dask.array.from_array(x, chunks=(137, 8)), "y.zarr", workers=4)
    array = zarr.open_array("y.zarr", mode="r")
    assert array.shards[0] >= 137 * 20
    assert array[:].tobytes() == x.tobytes()


def test_a_missing_or_damaged_shard_is_noticed(here):
    prepare("x.npy", "y.zarr", shard_size="8KiB")
    shard = Path("y.zarr/c/2/0")
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="c/2/0, which holds rows from 512 on, is missing"):
        open_source("y.zarr")
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DataError, match="fail their checksum"):
        open_source("y.zarr").read(0, 3001)


def test_the_manifest_has_a_digest_for_each_shard(here):
    prepare("x.npy", "y.zarr", "l2", shard_size="8KiB", ids=True)
    manifest = json.loads(Path("y.zarr/manifest.json").read_text())
    shards = manifest["shards"]
    assert len(shards) == 12
    assert {name for files in shards.values() for name in files} == {
        *(f"rows/c/{i}/0" for i in range(12)),
        *(f"rows.ids/c/{i}" for i in range(12)),
    }
    assert shards["c/3/0"]["rows/c/3/0"] == digest_of(Path("y.zarr/c/3/0"))
    assert shards["c/3/0"]["rows.ids/c/3"] == digest_of(Path("y.ids.zarr/c/3"))
    assert manifest["identity"]["steps"] == ["l2"]


def test_a_transformation_that_is_lost_or_damaged_is_noticed(here):
    prepare("x.npy", "y.zarr", "standardise")
    prepare("x.npy", "z.zarr", "pca=2")
    path = Path("y.zarr/transformation.safetensors")
    content = path.read_bytes()
    path.write_bytes(Path("z.zarr/transformation.safetensors").read_bytes())
    with pytest.raises(DataError, match="is another array's"):
        open_source("y.zarr")
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedFileError):
        open_source("y.zarr")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_source("y.zarr")
