"""Everything that can be wrong with data is one line that names the data and what to do."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
import zarr

from streamgmm.errors import DataError
from streamgmm.io.sources import Source, open_source
from streamgmm.io.sources.dask_array import DaskSource
from streamgmm.io.sources.fbin import FbinSource
from streamgmm.io.sources.npy import NpySource
from streamgmm.io.sources.raw import RawFile
from streamgmm.io.sources.zarr_array import ZarrSource
from tests.io.sources.conftest import CHUNK_ROWS, SHARD_ROWS, make_rows, write_fbin, write_npy, write_zarr

ABSENT = b"\xff" * 16


def refusal(data: Any, *fragments: str) -> str:
    """The message with which `open_source` refuses ``data``: one line that has every fragment in it."""
    with pytest.raises(DataError) as caught:
        open_source(data)
    return check_message(caught.value, *fragments)


def read_refusal(source: Source, *fragments: str, span: tuple[int, int] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        source.read(*(span or (0, source.shape[0])))
    return check_message(caught.value, source.name, *fragments)


def check_message(error: DataError, *fragments: str) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message, message
    return message


# Paths


def test_missing_path(tmp_path: Path) -> None:
    for name in ("x.npy", "x.fbin", "x.zarr", "deep/x.npy"):
        refusal(tmp_path / name, str(tmp_path / name), "no such file", "check the path")
        refusal(str(tmp_path / name), str(tmp_path / name), "no such file")
    with pytest.raises(DataError, match="no such file"):
        ZarrSource(tmp_path / "x.zarr")
    with pytest.raises(DataError, match="no such file"):
        NpySource(tmp_path / "x.npy")


def test_paths_that_the_system_refuses(tmp_path: Path) -> None:
    refusal("a\0b.npy", "check the path")
    refusal("a" * 300 + ".npy", "check the path")
    file = write_npy(tmp_path / "x.npy", make_rows("float32"))
    refusal(file / "y.npy", "y.npy", "check the path")
    os.mkfifo(tmp_path / "pipe.npy")
    refusal(tmp_path / "pipe.npy", "pipe.npy", "not a regular file")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_npy(tmp_path / "x.npy", make_rows("float32"))
    folder = write_zarr(tmp_path / "x.zarr", make_rows("float32"))

    def deny(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Not chmod: tests may run as root, whom no mode stops.
    monkeypatch.setattr(os, "open", deny)
    refusal(file, str(file), "permission denied", "make it readable")
    monkeypatch.undo()
    monkeypatch.setattr(os, "scandir", deny)
    refusal(folder, str(folder), "permission denied", "make it readable")


def test_too_many_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    file = write_npy(tmp_path / "x.npy", make_rows("float32"))
    monkeypatch.setattr(os, "open", exhaust)
    refusal(file, str(file), "Too many open files", "ulimit -n")


def test_unknown_suffix_and_plain_folder(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    refusal(tmp_path / "x.csv", "x.csv", "'.csv'", ".npy, .fbin", "Zarr")
    refusal(tmp_path, str(tmp_path), "folder", "zarr.json", "list the files")
    (tmp_path / "empty.zarr").mkdir()
    refusal(tmp_path / "empty.zarr", "empty.zarr", "give the folder of a Zarr array")
    with pytest.raises(DataError, match="names no type"):
        FbinSource(tmp_path / "x.csv")
    with pytest.raises(DataError, match="give the folder of a Zarr array"):
        ZarrSource(tmp_path / "empty.zarr")


# Arrays and lists


def test_empty_and_wrong_rank(tmp_path: Path) -> None:
    refusal([], "empty", "at least one file")
    refusal((), "empty")
    refusal(np.zeros((0, 3)), "holds no data")
    refusal(np.zeros((3, 0)), "holds no data")
    refusal(np.zeros(3), "must be two-dimensional", "(3,)")
    refusal([1, 2, 3], "must be two-dimensional")
    refusal(np.zeros((2, 2, 2)), "must be two-dimensional")
    refusal(torch.zeros(3), "torch tensor", "must be two-dimensional")
    refusal(dask.array.zeros(3), "dask array", "must be two-dimensional")
    refusal(zarr.zeros(3), "must be two-dimensional")
    refusal(write_npy(tmp_path / "x.npy", np.zeros(3)), "x.npy", "must be two-dimensional")
    refusal(write_npy(tmp_path / "y.npy", np.zeros((0, 3))), "y.npy", "holds no data")
    refusal(write_fbin(tmp_path / "x.fbin", np.zeros((0, 3))), "x.fbin", "holds no data")


def test_values_that_are_not_real_numbers(tmp_path: Path) -> None:
    refusal(np.zeros((2, 2), complex), "complex128", "real numbers")
    refusal(torch.zeros(2, 2, dtype=torch.complex64), "complex64", "real numbers")
    refusal(torch.eye(2).to_sparse(), "torch tensor", "dense")
    refusal(dask.array.zeros((2, 2), dtype=complex), "complex128", "real numbers")
    refusal(zarr.zeros((2, 2), dtype=complex), "complex128", "real numbers")
    refusal([["a", "b"]], "real numbers")
    refusal([[1, 2], [3]], "list", "cannot be made an array")
    refusal(object(), "object", "give a dense two-dimensional array")
    refusal(None, "NoneType")
    refusal(np.ma.masked_less(np.eye(2), 0.5), "masked", "fill them")
    refusal(write_npy(tmp_path / "c.npy", np.zeros((2, 2), complex)), "c.npy", "complex128")
    refusal(write_npy(tmp_path / "t.npy", np.zeros((2, 2), "M8[s]")), "t.npy", "real numbers")
    refusal(write_npy(tmp_path / "s.npy", np.zeros((2, 2), [("a", "f4")])), "s.npy", "real numbers")
    np.save(tmp_path / "o.npy", np.array([[1, "x"]], dtype=object))
    refusal(tmp_path / "o.npy", "o.npy", "object", "real numbers")


def test_disagreeing_parts(tmp_path: Path) -> None:
    a = write_npy(tmp_path / "a.npy", make_rows("float32", d=5))
    wide = write_fbin(tmp_path / "b.fbin", make_rows("float32", d=6))
    other = write_npy(tmp_path / "c.npy", make_rows("float64", d=5))
    refusal([a, wide], "a.npy", "b.fbin", "6 features", "has 5", "give parts")
    refusal([a, other], "a.npy", "c.npy", "float32", "float64", "convert")
    refusal([a, tmp_path / "none.npy"], "none.npy", "no such file")
    refusal([a, np.zeros(3)], "must be two-dimensional")


def test_lists_that_are_arrays() -> None:
    assert open_source([[1, 2], [3, 4]]).read(1, 2).tolist() == [[3.0, 4.0]]
    assert open_source([np.array([1.0, 2.0]), np.array([3.0, 4.0])]).shape == (2, 2)
    assert open_source([np.eye(2), [[5.0, 6.0]]]).shape == (3, 2)
    source = open_source(np.eye(2))
    assert open_source(source) is source
    assert open_source([source, source]).shape == (4, 2)


# .npy and .fbin


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_the_wrong_size(tmp_path: Path, order: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.asarray(make_rows("float32"), order=order))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refusal(path, "x.npy", "truncated", str(len(whole)), str(len(whole) - 1), "restore")
    path.write_bytes(whole + b"\0")
    refusal(path, "x.npy", "longer than its header says", str(len(whole) + 1), "write it again")


def npy_header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode("latin1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUM",
        b"not an array at all",
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)"),
        npy_header("(" * 5000),
        npy_header("__import__('os').abort()"),
        npy_header("{'descr': 'zz', 'fortran_order': False, 'shape': (2, 2)}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2.5, 2)}"),
        npy_header("{'descr': '<f4', 'fortran_order': False}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}", b"\x09\x00"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    ],
)
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
def test_npy_header_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    refusal(path, "x.npy", "no valid .npy header", "restore it or write it")


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [
        ((2**62, 4), "truncated"),  # n·d·itemsize is 0 modulo 2⁶⁴
        ((2**40, 2**40), "truncated"),
        ((-1, 4), "holds no data"),
        ((-4, -4), "holds no data"),
    ],
)
def test_npy_header_that_lies(tmp_path: Path, shape: tuple[int, int], fragment: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}") + bytes(64))
    refusal(path, "x.npy", fragment)


def test_npy_versions(tmp_path: Path) -> None:
    rows = make_rows("float32")
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "x.npy").open("wb") as stream:
            np.lib.format.write_array(stream, rows, version=version)
        source = open_source(tmp_path / "x.npy")
        assert source.read(0, 50).tobytes() == rows.tobytes()
        source.close()


def test_fbin_of_the_wrong_size(tmp_path: Path) -> None:
    path = write_fbin(tmp_path / "x.u8bin", make_rows("uint8"))
    path.write_bytes(path.read_bytes()[:-1])
    refusal(path, "x.u8bin", "truncated", "needs 258", "has 257", "restore")
    path.write_bytes(path.read_bytes() + b"ab")
    refusal(path, "x.u8bin", "longer", "needs 258", "has 259")
    path.write_bytes(b"\1\0\0")
    refusal(path, "x.u8bin", "truncated", "needs 8", "has 3")
    # n·d·4 is 2⁶⁶ − …: it would wrap in 64 bits, and n·d in 32.
    lying = tmp_path / "y.fbin"
    lying.write_bytes(struct.pack("<II", 2**32 - 1, 2**32 - 1) + bytes(16))
    refusal(lying, "y.fbin", "truncated", str(8 + 4 * (2**32 - 1) ** 2))
    wrapping = tmp_path / "z.fbin"
    wrapping.write_bytes(struct.pack("<II", 2**31, 2**31))
    refusal(wrapping, "z.fbin", "truncated", str(8 + 2**64))


def test_file_that_shrinks_or_closes_while_open(tmp_path: Path) -> None:
    rows = make_rows("float32")
    for path in (write_npy(tmp_path / "x.npy", rows), write_npy(tmp_path / "f.npy", np.asfortranarray(rows))):
        source = open_source(path)
        os.truncate(path, path.stat().st_size - 4)
        assert source.read(0, 5).tobytes() == rows[:5].tobytes()
        read_refusal(source, "truncated", "restore")
        source.close()
        read_refusal(source, "Bad file descriptor")
        source.close()


def test_descriptor_is_closed_with_its_owner(tmp_path: Path) -> None:
    file = RawFile(write_npy(tmp_path / "x.npy", make_rows("float32")))
    descriptor = file.extent(0, 1).descriptor
    os.fstat(descriptor)
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_real_types_that_no_kernel_reads_are_converted(tmp_path: Path) -> None:
    for stored, streamed in (("int16", "float32"), (">i4", "float64"), ("bool", "uint8"), ("int64", "float64")):
        rows = make_rows("int8").astype(stored)
        for array in (rows, np.asfortranarray(rows)):
            source = open_source(write_npy(tmp_path / "x.npy", array))
            assert source.dtype == streamed
            assert source.read_path == "decode"
            assert (source.read(3, 40) == rows[3:40]).all()
            source.close()
    source = open_source(write_zarr(tmp_path / "x.zarr", make_rows("int8").astype(">i2")))
    assert source.dtype == "float32"
    assert (source.read(3, 40) == make_rows("int8")[3:40]).all()


def test_conversion_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgmm.io.sources.npy.SCRATCH_BYTES", 100)
    rows = make_rows("float32")
    source = open_source(write_npy(tmp_path / "x.npy", rows.astype(">f4")))
    assert source.read(1, 50).tobytes() == rows[1:].tobytes()
    source.close()


# Zarr

LAYOUTS = {
    "v3": {},
    "v3_dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "v2": {"zarr_format": 2},
    "sharded": {"shards": (SHARD_ROWS, 5)},
}


def pieces(path: Path) -> list[Path]:
    """The chunk or shard files in order of their rows."""
    files = [
        file for file in path.rglob("*") if file.is_file() and file.name not in ("zarr.json", ".zarray", ".zattrs")
    ]
    return sorted(files, key=lambda file: [int(part) for part in file.as_posix().replace("/", ".").split(".")[-2:]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, -1])
def test_zarr_missing_piece(tmp_path: Path, layout: str, which: int) -> None:
    path = write_zarr(tmp_path / "x.zarr", make_rows("float32"), **LAYOUTS[layout])
    files = pieces(path)
    rows = SHARD_ROWS if layout == "sharded" else CHUNK_ROWS
    source = open_source(path)
    files[which].unlink()
    key = files[which].relative_to(path).as_posix()
    first = which % len(files) * rows
    refusal(path, "x.zarr", f"{key}, which holds rows from {first} on, is missing", "write_empty_chunks=True")
    refusal(zarr.open_array(path), "x.zarr", key, "is missing")
    # Lost after it was opened.
    read_refusal(source, f"rows {first} to ", f"{key} is missing", "restore it")


def test_zarr_missing_piece_in_another_store(tmp_path: Path) -> None:
    store = zarr.storage.MemoryStore()
    config = {"write_empty_chunks": True}
    array = zarr.create_array(store, name="v", shape=(50, 5), chunks=(7, 5), dtype="f4", config=config)
    array[:21] = make_rows("float32")[:21]
    refusal(array, "v", "v/c/3/0, which holds rows from 21 on, is missing")
    refusal(zarr.open_array(tmp_path / "never.zarr", mode="w", shape=(50, 5), dtype="f4"), "never.zarr", "is missing")


def test_zarr_zeros_left_out_are_refused(tmp_path: Path) -> None:
    rows = make_rows("float32")
    rows[14:21] = 0
    empty = {"config": {"write_empty_chunks": False}}
    refusal(write_zarr(tmp_path / "x.zarr", rows, **empty), "c/2/0", "write_empty_chunks=True if its writer left zeros")
    source = open_source(write_zarr(tmp_path / "y.zarr", rows, shards=(SHARD_ROWS, 5), **empty))
    read_refusal(source, "rows 0 to 6", "inner chunk (2, 0)", "rows from 14", "write_empty_chunks=True")


def sharded(tmp_path: Path, **options: object) -> tuple[Path, list[Path], Source]:
    path = write_zarr(tmp_path / "x.zarr", make_rows("float32"), shards=(SHARD_ROWS, 5), **options)
    return path, pieces(path), open_source(path)


def test_zarr_missing_inner_chunk(tmp_path: Path) -> None:
    from google_crc32c import value

    _, files, source = sharded(tmp_path)
    raw = bytearray(files[1].read_bytes())
    raw[-52:-36] = ABSENT  # the first of the index's three entries, before the CRC
    raw[-4:] = value(bytes(raw[-52:-4])).to_bytes(4, "little")
    files[1].write_bytes(raw)
    assert source.read(0, 21).tobytes() == make_rows("float32")[:21].tobytes()
    read_refusal(source, "c/1/0", "lacks inner chunk (0, 0)", "rows from 21", "restore it", span=(30, 35))


@pytest.mark.parametrize("compressors", [None, "auto"])
@pytest.mark.parametrize("index_location", ["start", "end"])
@pytest.mark.parametrize("kept", [0, 1, 60, -1])
def test_zarr_truncated_shard(tmp_path: Path, compressors: Any, index_location: str, kept: int) -> None:
    from zarr.codecs import ShardingCodec, ZstdCodec

    inner = [zarr.codecs.BytesCodec(), *([ZstdCodec()] if compressors else [])]
    codec = ShardingCodec(chunk_shape=(7, 5), codecs=inner, index_location=index_location)
    path = write_zarr(
        tmp_path / "x.zarr",
        make_rows("float32"),
        chunks=(SHARD_ROWS, 5),
        serializer=codec,
        compressors=None,
        filters=None,
    )
    file = pieces(path)[1]
    file.write_bytes(file.read_bytes()[:kept])
    for span in ((21, 42), (0, 50), (41, 42)):
        read_refusal(open_source(path), "c/1/0", "truncated", "restore", span=span)


def test_zarr_truncated_after_it_was_checked(tmp_path: Path) -> None:
    _, files, source = sharded(tmp_path)
    source.read(0, 50)
    files[1].write_bytes(b"")
    read_refusal(source, "rows 21 to 27", "c/1/0 is truncated")


@pytest.mark.parametrize("shards", [None, (SHARD_ROWS, 5)])
def test_zarr_flipped_bit_under_crc32c(tmp_path: Path, shards: Any) -> None:
    path = write_zarr(tmp_path / "x.zarr", make_rows("float32"), shards=shards, compressors=[zarr.codecs.Crc32cCodec()])
    file = pieces(path)[1]
    raw = bytearray(file.read_bytes())
    raw[10] ^= 4
    file.write_bytes(raw)
    first = 21 if shards else 7
    read_refusal(open_source(path), f"rows {first} to {first + 6}", "checksum", "restore it")
    assert len(open_source(path).read(first + 7, 50)) == 43 - first


@pytest.mark.parametrize("layout", ["v3", "v2", "sharded"])
@pytest.mark.parametrize("compressor", ["blosc", "zstd", "gzip", None])
def test_zarr_damaged_chunk(tmp_path: Path, layout: str, compressor: str | None) -> None:
    options: dict[str, object] = dict(LAYOUTS[layout])
    if layout == "v2":
        import numcodecs

        known = {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd(), "gzip": numcodecs.GZip(), None: None}
        options["compressors"] = known[compressor]
    else:
        codecs = {"blosc": zarr.codecs.BloscCodec(), "zstd": zarr.codecs.ZstdCodec(), "gzip": zarr.codecs.GzipCodec()}
        options["compressors"] = [codecs[compressor]] if compressor else None
    path = write_zarr(tmp_path / "x.zarr", make_rows("float32"), **options)
    file = pieces(path)[1]
    raw = file.read_bytes()
    if layout == "sharded":
        file.write_bytes(b"\x5a" * 40 + raw[40:])
        if compressor is None:
            return  # raw bytes carry no checksum: nothing can tell
        read_refusal(open_source(path), "rows 21 to 27 cannot be read", "restore it")
    else:
        file.write_bytes(raw[: len(raw) // 2])
        read_refusal(open_source(path), "rows 7 to 13 cannot be read", "restore it")


def test_zarr_group(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    refusal(tmp_path / "g.zarr", "g.zarr", "group", "none")
    for name in ("train", "test"):
        group.create_array(name, data=make_rows("float32"))
    refusal(tmp_path / "g.zarr", "g.zarr", "test, train", "name the array inside", "g.zarr/test")
    refusal(group, "g.zarr", "test, train")
    assert open_source(tmp_path / "g.zarr" / "train").shape == (50, 5)
    assert open_source(group["train"]).shape == (50, 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: "",
        lambda meta: "{",
        lambda meta: "[]",
        lambda meta: "{}",
        lambda meta: json.dumps({**meta, "shape": [50]}),
        lambda meta: json.dumps({**meta, "shape": [-50, 5]}),
        lambda meta: json.dumps({**meta, "shape": "many"}),
        lambda meta: json.dumps({**meta, "shape": [10**15, 5]}),
        lambda meta: json.dumps({**meta, "data_type": "colour"}),
        lambda meta: json.dumps({**meta, "codecs": [{"name": "none-such"}]}),
        lambda meta: json.dumps({key: value for key, value in meta.items() if key != "chunk_grid"}),
    ],
)
def test_zarr_damaged_metadata(tmp_path: Path, change: Any) -> None:
    path = write_zarr(tmp_path / "x.zarr", make_rows("float32"))
    file = path / "zarr.json"
    file.write_text(change(json.loads(file.read_text())))
    refusal(path, "x.zarr")


def test_zarr_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "x.zarr", make_rows("float32"), zarr_format=2)
    file = path / ".zarray"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "filters": [{"id": "pickle", "protocol": 5}]}))
    refusal(path, "x.zarr", "pickle")


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec:UserWarning")
def test_zarr_sharding_that_cannot_be_checked(tmp_path: Path) -> None:
    from zarr.codecs import BytesCodec, GzipCodec, ShardingCodec

    nested = ShardingCodec(chunk_shape=(21, 5), codecs=[ShardingCodec(chunk_shape=(7, 5))])
    wrapped = ShardingCodec(chunk_shape=(7, 5))
    big = ShardingCodec(chunk_shape=(7, 5), index_codecs=[BytesCodec(endian="big")])
    rows = make_rows("float32")
    for name, codec, compressors in (("n", nested, None), ("w", wrapped, [GzipCodec()]), ("b", big, None)):
        options: dict[str, object] = {"chunks": (42, 5), "serializer": codec, "compressors": compressors}
        path = tmp_path / f"{name}.zarr"
        write_zarr(path, rows, **options)
        refusal(path, f"{name}.zarr", "sharding", "write it again")


# Dask


def test_dask_is_imported_only_by_who_has_it() -> None:
    code = "import sys, streamgmm.io.sources as s; s.open_source([[1.0]]); sys.exit('dask.array' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dask_unknown_chunks() -> None:
    array = dask.array.from_array(make_rows("float32"), chunks=(10, 5))
    refusal(array[array[:, 0] > 0], "dask array", "unknown chunk sizes", "compute_chunk_sizes()")


def test_dask_failing_graph() -> None:
    def fail(block: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("on\npurpose")

    array = dask.array.from_array(make_rows("float32"), chunks=(10, 5))
    failing = array.map_blocks(fail, dtype="float32", meta=np.empty((0, 0), "float32"))
    read_refusal(DaskSource(failing), "rows 0 to 9", "ZeroDivisionError", "check the graph")
    lying = array.map_blocks(lambda block: block[:-1], dtype="float32")
    read_refusal(DaskSource(lying), "rows 0 to 9", "(9, 5)", "(10, 5)")


def test_dask_partitions_are_computed_once_in_a_scan() -> None:
    computed: list[int] = []

    def note(block: np.ndarray) -> np.ndarray:
        computed.append(len(block))
        return block

    rows = make_rows("float32")
    array = dask.array.from_array(rows, chunks=(20, 5)).map_blocks(note, dtype="float32", meta=rows[:0])
    source = DaskSource(array)
    assert np.concatenate(list(source.chunks(3))).tobytes() == rows.tobytes()
    assert computed == [20, 20, 10]
