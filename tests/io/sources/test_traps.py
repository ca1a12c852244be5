"""Files made to mislead a reader: each is refused in one line, or read right."""

from __future__ import annotations

import itertools
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zarr

from streamgmm.errors import RequestError
from streamgmm.io.sources import open_source
from streamgmm.io.sources.granules import Granules
from tests.io.sources.conftest import (
    CHUNK_ROWS,
    SHARD_ROWS,
    make_rows,
    shard_codec,
    table,
    vectors,
    write_arrow,
    write_hdf5,
    write_npy,
    write_parquet,
    write_vecs,
    write_zarr,
)
from tests.io.sources.test_bad_input import pieces, read_refusal, refusal

ROWS = make_rows("float32")
CHUNK_BYTES = CHUNK_ROWS * 5 * 4
ABSENT = b"\xff" * 16


# Uncompressed Zarr: read by us, so every trap of the format is ours to find.


def raw_shards(path: Path, *, checked: bool, rows: np.ndarray = ROWS) -> list[Path]:
    write_zarr(path, rows, **shard_codec(rows, checked=checked))
    assert open_source(path).read_path == "extents"
    return pieces(path)


def index_of(raw: bytes) -> np.ndarray:
    """The three (offset, length) pairs at a shard's end, before their CRC."""
    return np.frombuffer(raw[-52:-4], "<u8").reshape(3, 2).copy()


def with_index(body: bytes, table: np.ndarray) -> bytes:
    raw = table.astype("<u8").tobytes()
    return body + raw + google_crc32c.value(raw).to_bytes(4, "little")


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_of_inner_chunks_with_gaps_between_them(
    tmp_path: Path, checked: bool, order: tuple[int, ...]
) -> None:
    file = raw_shards(tmp_path / "x.zarr", checked=checked)[1]
    raw = file.read_bytes()
    table, body, placed = index_of(raw), b"gap", np.zeros((3, 2), np.uint64)
    for chunk in order:
        begin, length = (int(x) for x in table[chunk])
        placed[chunk] = len(body), length
        body += raw[begin : begin + length] + b"a gap"
    file.write_bytes(with_index(body, placed))
    source = open_source(tmp_path / "x.zarr")
    for start, stop in ((0, 50), (21, 42), (25, 36), (30, 31)):
        assert source.read(start, stop).tobytes() == ROWS[start:stop].tobytes()
        out = np.empty((stop - start, 5), np.float32)
        source.read_uncached(start, stop, out)
        assert out.tobytes() == ROWS[start:stop].tobytes()


@pytest.mark.parametrize("checked", [False, True])
def test_padding_of_the_last_chunks_is_never_read_as_rows(tmp_path: Path, checked: bool) -> None:
    file = raw_shards(tmp_path / "x.zarr", checked=checked)[-1]
    raw = bytearray(file.read_bytes())
    table = index_of(raw)
    begin = int(table[1, 0])  # rows 49 to 55, of which the array has one
    raw[begin + 20 : begin + CHUNK_BYTES] = b"\x7f" * (CHUNK_BYTES - 20)
    if checked:
        raw[begin + CHUNK_BYTES : begin + CHUNK_BYTES + 4] = google_crc32c.value(
            bytes(raw[begin : begin + CHUNK_BYTES])
        ).to_bytes(4, "little")
    file.write_bytes(raw)
    assert open_source(tmp_path / "x.zarr").read(40, 50).tobytes() == ROWS[40:].tobytes()


@pytest.mark.parametrize("uncached", [False, True])
@pytest.mark.parametrize("layout", ["shards", "plain"])
@pytest.mark.parametrize("byte", [0, 70, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 3])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, layout: str, byte: int, uncached: bool) -> None:
    path = tmp_path / "x.zarr"
    if layout == "shards":
        file, first = raw_shards(path, checked=True)[1], 21
    else:
        write_zarr(path, ROWS, compressors=[zarr.codecs.Crc32cCodec()])
        file, first = pieces(path)[1], 7
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 0x10
    file.write_bytes(raw)
    source = open_source(path)
    assert source.read_path == "extents"
    for start, stop in ((0, 50), (first, first + 7), (first + 3, first + 4)):
        out = np.empty((stop - start, 5), np.float32)
        read = source.read_uncached if uncached else source.read_into
        with pytest.raises(RequestError, match="checksum") as caught:
            read(start, stop, out)
        rows = f"rows {max(first, start)} to {min(first + 7, stop) - 1}"
        for fragment in ("x.zarr", str(file), rows, "bytes 0 to 139", "restore it"):
            assert fragment in str(caught.value), caught.value
    assert len(source.read(first + 7, 50)) == 43 - first


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table[0].fill(2**64 - 1), "lacks inner chunk (0, 0)"),
        (lambda table: table[1].__setitem__(1, 0), "lacks inner chunk (1, 0)"),
        (lambda table: table[1].__setitem__(0, 2**63), "points past its"),
        (lambda table: table[2].__setitem__(0, 2**64 - 2), "points past its"),
        (lambda table: table[2].__setitem__(1, 2**63), "points past its"),
        (lambda table: table[1].__setitem__(1, CHUNK_BYTES - 4), "is truncated: 136 bytes where 140 are expected"),
        (lambda table: table[1].__setitem__(1, CHUNK_BYTES + 4), "is damaged: 144 bytes where 140 are expected"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: Any, told: str) -> None:
    file = raw_shards(tmp_path / "x.zarr", checked=False)[1]
    raw = file.read_bytes()
    table = index_of(raw)
    change(table)
    file.write_bytes(with_index(raw[:-52], table))
    source = open_source(tmp_path / "x.zarr")
    read_refusal(source, "c/1/0", told, "restore it")
    assert source.read(0, 21).tobytes() == ROWS[:21].tobytes()


def test_an_index_that_fails_its_checksum(tmp_path: Path) -> None:
    file = raw_shards(tmp_path / "x.zarr", checked=False)[1]
    raw = bytearray(file.read_bytes())
    raw[-30] ^= 1
    file.write_bytes(raw)
    read_refusal(open_source(tmp_path / "x.zarr"), "c/1/0: its index fails its checksum", "restore it")


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 51, 100, -1])
def test_raw_shard_cut_short(tmp_path: Path, checked: bool, kept: int) -> None:
    path = tmp_path / "x.zarr"
    file = raw_shards(path, checked=checked)[1]
    file.write_bytes(file.read_bytes()[:kept])
    read_refusal(open_source(path), "c/1/0", "truncated", "restore")


@pytest.mark.parametrize("kept", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES + 1])
def test_raw_chunk_of_the_wrong_size(tmp_path: Path, kept: int) -> None:
    path = write_zarr(tmp_path / "x.zarr", ROWS, compressors=None)
    file = pieces(path)[1]
    file.write_bytes((file.read_bytes() + b"\0")[:kept])
    read_refusal(open_source(path), "rows 7 to 13", "c/1/0 is", f"{kept} bytes where 140 are expected", "restore it")


@pytest.mark.parametrize("checked", [False, True])
def test_raw_shard_lost_or_cut_while_open(tmp_path: Path, checked: bool) -> None:
    files = raw_shards(tmp_path / "x.zarr", checked=checked)
    source = open_source(tmp_path / "x.zarr")
    files[2].unlink()
    read_refusal(source, "rows 42 to 48", "c/2/0 is missing", "restore it")
    source.read(21, 42)
    os.truncate(files[1], 150)
    read_refusal(source, str(files[1]), "ends at byte 150", "truncated")
    source.close()


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgmm.io.sources.zarr_extents.PIECES_OPEN", 2)
    rows = make_rows("float32", 400)
    raw_shards(tmp_path / "x.zarr", checked=False, rows=rows)
    source, before = open_source(tmp_path / "x.zarr"), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert source.read(0, 400).tobytes() == rows.tobytes()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for layout, options in {"shards": shard_codec(ROWS, checked=False), "zstd": {}}.items():
        path = write_zarr(tmp_path / f"{layout}.zarr", ROWS, **options)
        file = pieces(path)[1]
        secret.write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(secret)
        refusal(path, f"{layout}.zarr", "c/1/0 is a link out of its folder", str(secret), "copy the file")
        refusal(zarr.open_array(path, mode="r"), "is a link out of its folder")
    linked = write_zarr(tmp_path / "folder.zarr", ROWS, compressors=None)
    (linked / "c").rename(tmp_path / "elsewhere")
    (linked / "c").symlink_to(tmp_path / "elsewhere")
    refusal(linked, "c is a link out of its folder")
    # Within the folder, and from a link to the folder itself, links are harmless; a circle of them ends.
    whole = write_zarr(tmp_path / "whole.zarr", ROWS, compressors=None)
    pieces(whole)[0].rename(whole / "first")
    (whole / "c" / "0" / "0").symlink_to("../../first")
    (whole / "again").symlink_to(".")
    (tmp_path / "link.zarr").symlink_to(whole)
    assert open_source(tmp_path / "link.zarr").read(0, 50).tobytes() == ROWS.tobytes()


@pytest.mark.parametrize("separator", ["../", "/../../", "", "a"])
def test_keys_that_would_leave_the_folder(tmp_path: Path, separator: str) -> None:
    path = write_zarr(tmp_path / "x.zarr", ROWS, compressors=None)
    meta = json.loads((path / "zarr.json").read_text())
    for name in ("default", "v2"):
        meta["chunk_key_encoding"] = {"name": name, "configuration": {"separator": separator}}
        (path / "zarr.json").write_text(json.dumps(meta))
        refusal(path, "x.zarr", "metadata")


# .fvecs and .bvecs


@pytest.mark.parametrize(("suffix", "dtype"), [(".fvecs", "float32"), (".bvecs", "uint8")])
def test_vecs_that_lie(tmp_path: Path, suffix: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(dtype)
    path = write_vecs(tmp_path / f"x{suffix}", rows)
    whole, size = path.read_bytes(), 4 + rows[0].nbytes
    for row in (1, 23, 49):
        for count in (0, 4, 6, -5, 2**31 - 1):
            damaged = bytearray(whole)
            damaged[row * size : row * size + 4] = struct.pack("<i", count)
            path.write_bytes(damaged)
            source = open_source(path)
            read_refusal(source, f"row {row} at byte {row * size} has {count} features", "the first has 5", "restore")
            assert source.read(0, row).tobytes() == rows[:row].tobytes()
    for count in (0, -1, 2**31 - 1, 2**24 + 1):
        path.write_bytes(struct.pack("<i", count) + whole[4:])
        refusal(path, path.name, f"its first row has {count} features", "restore")
    for cut in (1, 3, len(whole) - 1, len(whole) - size + 4):
        path.write_bytes(whole[:cut])
        refusal(path, path.name, "truncated", "restore")
    path.write_bytes(b"")
    refusal(path, path.name, "truncated")
    path.write_bytes(whole)
    monkeypatch.setattr("streamgmm.io.sources.vecs.SCRATCH_BYTES", 3 * size + 1)
    source = open_source(path)
    assert source.read(1, 50).tobytes() == rows[1:].tobytes()
    os.truncate(path, len(whole) - 2)
    read_refusal(source, "ends at byte", "truncated")


# HDF5


def test_hdf5_data_in_other_files_is_refused(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "other.h5", ROWS)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["outside"] = h5py.ExternalLink("other.h5", "/vectors")
        file["soft"] = h5py.SoftLink("/outside")
        layout = h5py.VirtualLayout(shape=ROWS.shape, dtype="f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "vectors", shape=ROWS.shape)
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("external", ROWS.shape, "f4", external=[(str(tmp_path / "raw"), 0, ROWS.nbytes)])
        file.create_group("group").create_dataset("vectors", data=ROWS)
    for name in ("outside", "soft"):
        refusal(f"{tmp_path}/x.h5::{name}", "x.h5", repr(name), "link", "name the dataset itself")
    for name in ("virtual", "external"):
        refusal(f"{tmp_path}/x.h5::{name}", f"x.h5::{name}", "other files", "copy them")
    refusal(f"{tmp_path}/x.h5::group", "is a group", "'group/vectors'")
    refusal(f"{tmp_path}/x.h5::none", "no dataset 'none'", "'external', 'group'")
    refusal(tmp_path / "x.h5", "holds 3 two-dimensional datasets", "name one")
    for inside in ("::group/vectors", "/group/vectors", "::/group//vectors"):
        source = open_source(f"{tmp_path}/x.h5{inside}")
        assert source.read(0, 50).tobytes() == ROWS.tobytes()
        assert source.name == f"{tmp_path}/x.h5::group/vectors" or "//" in inside
        source.close()


def test_hdf5_the_one_dataset_is_taken(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", ROWS, "deep/vectors")
    write_hdf5(path, np.arange(50), "ids")
    assert open_source(path).name.endswith("x.hdf5::deep/vectors")
    write_hdf5(path, ROWS, "more")
    refusal(path, "holds 2", "'deep/vectors', 'more'", "::deep/vectors")


def test_hdf5_parts_never_written_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("contiguous", (50, 5), "f4")
        file.create_dataset("chunked", (50, 5), "f4", chunks=(7, 5))[:21] = ROWS[:21]
        file.create_dataset("empty", (0, 5), "f4", chunks=(7, 5), maxshape=(None, 5))
        file.create_dataset("flat", data=np.zeros(5))
        file.create_dataset("names", data=[[b"a", b"b"]])
    refusal(f"{tmp_path}/x.h5::contiguous", "never written", "fill values")
    refusal(f"{tmp_path}/x.h5::chunked", "5 of its 8 chunks were never written", "fill values")
    refusal(f"{tmp_path}/x.h5::empty", "holds no data")
    refusal(f"{tmp_path}/x.h5::flat", "two-dimensional")
    refusal(f"{tmp_path}/x.h5::names", "real numbers")


def test_hdf5_damaged(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.h5", ROWS)
    whole = path.read_bytes()
    for content in (b"", b"\x89HDF\r\n\x1a\n", b"no HDF5 at all" * 100, whole[:-1], whole[:1000]):
        path.write_bytes(content)
        refusal(path, "x.h5", "restore")
    path = write_hdf5(tmp_path / "z.h5", ROWS, chunks=(7, 5), compression="gzip", fletcher32=True)
    with h5py.File(path) as file:
        chunk = file["vectors"].id.get_chunk_info_by_coord((14, 0))
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset + 4] ^= 0xFF
    path.write_bytes(raw)
    source = open_source(path)
    assert source.read(0, 14).tobytes() == ROWS[:14].tobytes()
    read_refusal(source, "z.h5::vectors", "rows 10 to 19 cannot be read", "restore", span=(10, 20))
    source.close()


# Arrow and Parquet


@pytest.mark.parametrize("write", [write_arrow, write_parquet])
@pytest.mark.parametrize("kind", ["fixed", "lists"])
def test_table_values_that_are_missing(tmp_path: Path, write: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = ".arrow" if write is write_arrow else ".parquet"

    def attempt(column: pa.Array) -> str:
        monkeypatch.setattr("tests.io.sources.conftest.table", lambda rows, kind: pa.table({"vector": column}))
        path = write(tmp_path / f"x{suffix}", ROWS)
        with pytest.raises(RequestError) as caught:
            open_source(path).read(0, 50)
        return str(caught.value)

    typed = pa.list_(pa.float32(), 5) if kind == "fixed" else pa.list_(pa.float32())
    lists = ROWS.tolist()
    assert "miss" in attempt(pa.array([*lists[:30], None, *lists[31:]], typed))
    assert "miss" in attempt(pa.array([*lists[:30], [1.0, None, 2.0, 3.0, 4.0], *lists[31:]], typed))
    if kind == "lists":
        assert "row 30 has 4 features where the first has 5" in attempt(pa.array([*lists[:30], lists[0][:4]], typed))
        assert "holds no data" in attempt(pa.array([[], *lists], typed))


def test_table_columns_are_chosen_or_asked_for(tmp_path: Path) -> None:
    both = pa.table(
        {"a": vectors(ROWS), "b": vectors(-ROWS), "n": np.arange(50.0), "s": ["x"] * 50, "i": np.arange(50)}
    )
    for name, write in (("x.parquet", pa.parquet.write_table), ("x.arrow", _write_ipc)):
        path = tmp_path / name
        write(both, path)
        refusal(path, name, "several columns of lists", "'a', 'b'", f"{name}::a")
        refusal(f"{path}::c", name, "no column 'c'", "'a', 'b', 'n'")
        refusal(f"{path}::s", name, "'s' is string")
        assert open_source(f"{path}::b").read(0, 50).tobytes() == (-ROWS).tobytes()
        assert open_source(f"{path}::n").read(3, 5).tolist() == [[3.0], [4.0]]
        write(both.select(["n", "i"]), path)
        source = open_source(path)
        assert source.dtype == "float64"
        assert source.read(7, 8).tolist() == [[7.0, 7.0]]
        write(both.select(["n", "s"]), path)
        refusal(path, name, "neither one column of lists", "'s' is string", "::COLUMN")
        write(both.select(["n"]).slice(0, 0), path)
        refusal(path, name, "holds no data")


def _write_ipc(data: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, data.schema) as writer:
        writer.write_table(data, max_chunksize=CHUNK_ROWS)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "lz4.feather"])
def test_tables_cut_or_overwritten(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        write_parquet(path, ROWS, write_page_checksum=True)
    else:
        write_arrow(path, ROWS, compression="lz4" if "lz4" in name else None)
    whole = path.read_bytes()
    for cut in (0, 1, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refusal(path, name)
    # Damage in the middle is an error where the format can tell, and never anything but an error or rows.
    told = 0
    for place in range(16, len(whole), 61):
        raw = bytearray(whole)
        raw[place : place + 3] = b"\xff\xff\xff"
        path.write_bytes(raw)
        with suppress(RequestError):
            source = open_source(path)
            told += 1
            assert source.read(0, source.shape[0]).shape == source.shape
            told -= 1
    if name == "x.parquet":
        assert told > 0


def test_arrow_stream_is_told_apart(tmp_path: Path) -> None:
    data = table(ROWS)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as stream, pa.ipc.new_stream(stream, data.schema) as writer:
        writer.write_table(data)
    refusal(tmp_path / "x.arrow", "no Arrow IPC file", "new_file")


def test_arrow_batches_of_every_size_and_slices(tmp_path: Path) -> None:
    data = table(ROWS)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as stream, pa.ipc.new_file(stream, data.schema) as writer:
        for start, stop in ((0, 1), (1, 1), (1, 30), (30, 50)):
            for batch in data.slice(start, stop - start).to_batches() or [pa.RecordBatch.from_pylist([], data.schema)]:
                writer.write_batch(batch)
    source = open_source(tmp_path / "x.arrow")
    assert source.read_path == "extents"
    for start, stop in ((0, 50), (0, 1), (1, 2), (29, 31)):
        assert source.read(start, stop).tobytes() == ROWS[start:stop].tobytes()


def test_formats_without_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr("streamgmm.io.optional.import_module", missing)
    for name, extra in (("x.h5", "hdf5"), ("x.parquet", "arrow"), ("x.feather", "arrow")):
        (tmp_path / name).touch()
        with pytest.raises(RequestError, match=rf"pip install 'streamgmm\[{extra}\]'"):
            open_source(tmp_path / name)


# Granules


def test_granules_are_decoded_once_in_a_scan_and_again_when_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgmm.io.sources.granules.WINDOW_BYTES", 4 * 8)
    begun: list[int] = []
    sizes = [10, 0, 3, 7]

    def decode(granule: int) -> Any:
        begun.append(granule)
        first = sum(sizes[:granule])
        for row in range(first, first + sizes[granule], 3):
            yield np.arange(row, min(row + 3, first + sizes[granule]), dtype=np.float64)[:, None]

    granules = Granules(sizes, decode)

    def read(start: int, stop: int) -> None:
        out = np.empty((stop - start, 1))
        granules.read_into(start, stop, out)
        assert out[:, 0].tolist() == list(range(start, stop))

    for start in range(0, 20, 2):
        read(start, start + 2)
    assert begun == [0, 2, 3]
    read(8, 10)
    read(0, 2)  # behind the window
    assert begun == [0, 2, 3, 0, 0]
    granules.clear()
    short = Granules([10], lambda _: iter([np.zeros((4, 1))]))
    with pytest.raises(EOFError, match="ends at row 4"):
        short.read_into(3, 6, np.empty((3, 1)))


# Folders


def test_folders_of_shards(tmp_path: Path) -> None:
    for index, start in enumerate((0, 20, 40)):
        write_parquet(tmp_path / f"part-{index}.parquet", ROWS[start : start + 20])
    (tmp_path / ".part-0.parquet.crc").touch()
    source = open_source(tmp_path)
    assert source.read(0, 50).tobytes() == ROWS.tobytes()
    assert open_source(f"{tmp_path}::vector").read(19, 21).tobytes() == ROWS[19:21].tobytes()
    assert source.locate(21).endswith("part-1.parquet")
    write_npy(tmp_path / "x.npy", ROWS)
    refusal(tmp_path, "mixed files (.npy, .parquet)", "list those")
    (tmp_path / "notes.txt").touch()
    refusal(tmp_path, "not of shards alone", "list the files")
    refusal(f"{tmp_path}/x.npy::a", "hold one array")


def test_padded_columns_are_decoded(tmp_path: Path) -> None:
    source = open_source(write_zarr(tmp_path / "x.zarr", ROWS, chunks=(7, 6), shards=(SHARD_ROWS, 6), compressors=None))
    assert source.slow_because == "its chunks hold 6 of 5 features"
    assert source.read(3, 50).tobytes() == ROWS[3:].tobytes()
