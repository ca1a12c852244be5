"""What ``streamgmm info`` says of the way that a data set is read."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from tests.io.sources.conftest import write_arrow, write_fbin, write_hdf5, write_npy, write_parquet, write_vecs

ROWS = np.random.default_rng(0).random((5000, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr("streamgmm.io.advice._PROBE_SECONDS", 0.02)


def write_shards(path, rows, **options):
    array = zarr.create_array(path, shape=rows.shape, dtype=rows.dtype, chunks=(500, 8), shards=(1000, 8), **options)
    array[:] = rows
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.npy", write_npy),
        ("x.fbin", write_fbin),
        ("x.fvecs", write_vecs),
        ("x.h5", write_hdf5),
        ("x.arrow", write_arrow),
        ("x.zarr", lambda path, rows: write_shards(path, rows, compressors=None)),
    ],
)
def test_what_is_read_straight_into_place(here, call, name, write):
    write(here / name, ROWS)
    facts = call("info", name, "--json").json
    assert facts["read_path"] == "extents"
    assert facts["read_cost"] == "156.2 KiB a pass, read straight into place"
    assert facts["advice"] == "none: no other format is read faster"
    lines = call("info", name).stdout
    assert "read_cost" in lines
    assert "straight into place" in lines


def test_checksums_are_mentioned(here, call):
    write_shards(here / "x.zarr", ROWS, compressors=[zarr.codecs.Crc32cCodec()])
    assert "in whole chunks, for their checksums" in call("info", "x.zarr", "--json").json["read_cost"]


@pytest.mark.parametrize(
    ("name", "write", "because"),
    [
        ("x.zarr", write_shards, "its chunks are encoded (zstd)"),
        ("x.npy", lambda path, rows: np.save(path, rows.astype(">f4")), "its values are big-endian (>f4)"),
        ("f.npy", lambda path, rows: np.save(path, np.asfortranarray(rows)), "it is in Fortran order"),
        ("x.parquet", write_parquet, "Parquet pages are encoded"),
        ("x.feather", lambda path, rows: write_arrow(path, rows, compression="lz4"), "record batches are compressed"),
        ("x.h5", lambda path, rows: write_hdf5(path, rows, chunks=(100, 8), compression="gzip"), "HDF5 (gzip)"),
    ],
)
@pytest.mark.parametrize("gain", [1, 30])
def test_what_is_decoded_and_what_converting_would_gain(here, call, name, write, because, gain, monkeypatch):
    monkeypatch.setattr("streamgmm.io.advice.source_rate", lambda *some: 0.25e9)
    monkeypatch.setattr("streamgmm.io.advice.cache_rate", lambda *some: 0.25e9 * gain)
    write(here / name, ROWS)
    facts = call("info", name, "--json").json
    assert facts["read_path"] == "decode"
    assert because in facts["read_cost"]
    assert "decoded to 156.2 KiB a pass" in facts["read_cost"]
    assert "0.25 GB/s here" in facts["read_cost"]
    if gain == 1:
        assert facts["advice"] == "none: uncompressed data would be read hardly faster"
    else:
        assert "30.0 times as fast from the page cache (7.5 GB/s)" in facts["advice"]
        assert "convert it once to uncompressed Zarr shards, with streamgmm prepare" in facts["advice"]


def test_what_is_inside_a_file(here, call, refused):
    write_hdf5(here / "x.h5", ROWS, "train/vectors")
    assert call("info", "x.h5::train/vectors", "--json").json["n_samples"] == 5000
    assert call("info", "x.h5/train/vectors", "--json").json["n_samples"] == 5000
    refused("info", "x.h5::test", told=("x.h5", "no dataset 'test'", "'train'"))
    write_parquet(here / "x.parquet", ROWS)
    assert call("info", "x.parquet::vector", "--json").json["n_features"] == 8
    refused("info", "x.parquet::id", told=("x.parquet", "'id' is string"))


def test_damage_is_one_line(here, refused):
    path = write_shards(here / "x.zarr", ROWS)
    shard = next((path / "c").rglob("0"))
    raw = bytearray((shard / "0" if shard.is_dir() else shard).read_bytes())
    raw[:64] = bytes(64)
    (shard / "0" if shard.is_dir() else shard).write_bytes(raw)
    refused("info", "x.zarr", told=("x.zarr", "rows 0 to", "restore it"))
