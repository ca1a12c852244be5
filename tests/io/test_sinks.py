"""Results appear whole or not at all, and never in place of something else."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.errors import RequestError
from streamgmm.io import sinks
from streamgmm.io.sinks import Behind, open_sink

SUFFIXES = (".npy", ".zarr")
INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


def load(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.asarray(zarr.open_array(path, mode="r")[...])


def write(path: Path, array: np.ndarray, step: int = 7, *, overwrite: bool = False, behind: bool = False) -> None:
    opened = open_sink(path, array.shape, array.dtype, overwrite=overwrite)
    with Behind(opened) if behind else opened as sink:
        for start in range(0, len(array), step):
            sink.write(array[start : start + step])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(1,), (50,), (50, 1), (50, 3)])
@pytest.mark.parametrize("behind", [False, True])
def test_what_is_written_is_read_back(tmp_path, suffix, shape, behind):
    array = np.random.default_rng(0).integers(-9, 9, shape).astype(np.int32)
    write(tmp_path / f"x{suffix}", array, behind=behind)
    read = load(tmp_path / f"x{suffix}")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


@given(n=st.integers(1, 200), step=st.integers(1, 250), chunk=st.integers(1, 64))
@settings(max_examples=25, deadline=None)
def test_any_division_into_pieces_and_shards_gives_the_same_array(tmp_path_factory, n, step, chunk):
    path = tmp_path_factory.mktemp("zarr") / "x.zarr"
    array = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "_ZARR_CHUNK_BYTES", chunk * 8)
        patch.setattr(sinks, "_ZARR_SHARD_CHUNKS", 3)
        write(path, array, step)
    np.testing.assert_array_equal(load(path), array)


def test_pieces_are_cast_to_the_sink_s_type(tmp_path):
    with open_sink(tmp_path / "x.npy", (4, 2), INT32, overwrite=False) as sink:
        sink.write(np.asfortranarray(np.arange(8).reshape(4, 2)))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.arange(8).reshape(4, 2))


def test_an_array_of_zeros_leaves_no_shard_out(tmp_path):
    write(tmp_path / "x.zarr", np.zeros((50, 2), np.float32))
    assert [path for path in (tmp_path / "x.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt()])
@pytest.mark.parametrize("behind", [False, True])
def test_an_error_half_way_leaves_what_was_there(tmp_path, suffix, before, error, behind):
    path = tmp_path / f"x{suffix}"
    if before:
        write(path, np.full(3, 5, np.int32))

    def half(sink: sinks.Sink) -> None:
        sink.write(np.zeros(20, np.int32))
        raise error

    opened = open_sink(path, (50,), INT32, overwrite=True)
    with (
        pytest.raises(type(error)),
        Behind(opened) if behind else opened as sink,
    ):
        half(sink)
    assert [item.name for item in tmp_path.iterdir()] == [path.name] * before
    if before:
        np.testing.assert_array_equal(load(path), [5, 5, 5])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_existing_array_is_replaced_only_when_that_is_allowed(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, np.full(3, 5, np.int32))
    with pytest.raises(RequestError, match=r"exists; .*--overwrite"):
        open_sink(path, (3,), INT32, overwrite=False)
    np.testing.assert_array_equal(load(path), [5, 5, 5])
    write(path, np.full((40, 2), 6, np.int32), overwrite=True)
    np.testing.assert_array_equal(load(path), np.full((40, 2), 6))


def test_what_is_no_such_array_is_never_replaced(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "file.zarr").write_text("mine")
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "thesis.tex").write_text("mine")
    for name in ("folder.npy", "file.zarr", "folder.zarr"):
        with pytest.raises(RequestError, match=f"{name}: is not such an array"):
            open_sink(tmp_path / name, (3,), INT32, overwrite=True)
    assert (tmp_path / "file.zarr").read_text() == "mine"
    assert (tmp_path / "folder.zarr" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", ["x", "x.txt", "x.NPY", "x.npz", ".npy"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(RequestError, match=r"written to \.npy or \.zarr"):
        open_sink(tmp_path / name, (3,), INT32, overwrite=False)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path, suffix):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "missing", tmp_path / "file", Path("/dev/null"), Path("/proc"), tmp_path / ("a" * 300)):
        path = place.with_name(place.name + suffix) if len(place.name) > 255 else place / f"x{suffix}"
        with pytest.raises(RequestError, match="cannot be written") as caught:
            open_sink(path, (3,), INT32, overwrite=True)
        assert str(path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class FullFile:
    """An open file on a full device."""

    def write(self, payload: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def write_to_full_device(path: Path) -> None:
    with open_sink(path, (3,), FLOAT32, overwrite=False) as sink:
        sink._file.close()
        sink._file = FullFile()
        sink.write(np.zeros(3, np.float32))


def test_a_full_device_is_told_with_the_file_s_name(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(OSError, match="No space") as caught:
        write_to_full_device(path)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_zarr_array_that_cannot_be_created_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path, **options: object) -> None:
        path.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr, "create_array", full)
    path = tmp_path / "x.zarr"
    with pytest.raises(OSError, match="No space") as caught:
        write(path, np.zeros(3, np.int32))
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_write_that_fails_behind_is_told_and_leaves_nothing(tmp_path, suffix, pieces, monkeypatch):
    kind = {".npy": sinks._NpySink, ".zarr": sinks._ZarrSink}[suffix]

    def full(sink: object, rows: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kind, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / f"x{suffix}", np.zeros(7 * pieces, np.float32), behind=True)
    assert not list(tmp_path.iterdir())
