"""Files are whole or absent, and damage is told, wherever it is."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.errors import DamagedFileError, DataError
from streamgmm.storage import load_tensors, save_tensors, write_atomic

TENSORS = {
    "weights": np.arange(3.0),
    "counts": np.arange(6, dtype=np.int64).reshape(2, 3),
    "scalar": np.float64(-0.0).reshape(()),
    "empty": np.empty((0, 4), dtype=np.float32),
}
METADATA: dict[str, object] = {"format": "test", "list": [1, None, "ü"], "nested": {"a": 1.5}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("storage") / "whole.safetensors"
    save_tensors(path, TENSORS, METADATA)
    return path, path.read_bytes()


def assert_intact(path: Path) -> None:
    tensors, metadata = load_tensors(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()


def assert_damage_is_told_or_harmless(path: Path, payload: bytes) -> None:
    """A flipped byte may fall into the header's padding; it may not change what is loaded."""
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(payload)
    try:
        assert_intact(damaged)
    except DamagedFileError:
        return


def test_round_trip_keeps_bits_types_shapes_and_metadata(whole):
    assert_intact(whole[0])


def test_the_same_contents_give_the_same_bytes(whole, tmp_path):
    save_tensors(tmp_path / "again", dict(reversed(TENSORS.items())), METADATA)
    assert load_tensors(tmp_path / "again")[1] == METADATA
    assert_intact(tmp_path / "again")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_is_detected_or_harmless(whole, data):
    path, payload = whole
    position = data.draw(st.integers(0, len(payload) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = bytearray(payload)
    changed[position] ^= flip
    assert_damage_is_told_or_harmless(path, bytes(changed))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_truncation_or_extension_is_detected(whole, data):
    path, payload = whole
    length = data.draw(st.integers(0, len(payload) - 1))
    tail = data.draw(st.binary(min_size=1, max_size=20))
    for changed in (payload[:length], payload + tail):
        damaged = path.with_name("damaged.safetensors")
        damaged.write_bytes(changed)
        with pytest.raises(DamagedFileError):
            load_tensors(damaged)


@given(payload=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_refused(whole, payload):
    damaged = whole[0].with_name("damaged.safetensors")
    damaged.write_bytes(payload)
    with pytest.raises(DamagedFileError):
        load_tensors(damaged)


HOSTILE_HEADERS = {
    "longer than any file": (2**63).to_bytes(8, "little") + b"{}",
    "huge but plausible": (10**9).to_bytes(8, "little") + b"{" + b" " * 1000,
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "not an object": (2).to_bytes(8, "little") + b"[]",
    "no metadata": (2).to_bytes(8, "little") + b"{}",
    "null metadata": (21).to_bytes(8, "little") + b'{"__metadata__":null}',
}


@pytest.mark.parametrize("payload", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_hostile_headers_are_refused(tmp_path, payload):
    (tmp_path / "x").write_bytes(payload)
    with pytest.raises(DamagedFileError, match="x: "):
        load_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F64", "shape": [2**62, 4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}},
        {"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F65", "shape": [1], "data_offsets": [0, 8]}},
    ],
)
def test_hostile_tensors_are_refused(tmp_path, header):
    text = json.dumps({**header, "__metadata__": {"streamgmm": "{}", "checksum": "0"}}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(DamagedFileError, match="x: "):
        load_tensors(tmp_path / "x")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="absent: cannot be read"):
        load_tensors(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(tmp_path)


def test_a_write_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    write_atomic(tmp_path / "f", b"old")
    (tmp_path / ".f.tmp").write_bytes(b"left by a killed process")
    write_atomic(tmp_path / "f", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"new"}


class Killed(BaseException):
    """Stands for a signal at the worst moment."""


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    write_atomic(tmp_path / "f", b"old")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "f", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"old"}


def test_a_full_device_is_told_with_the_file_s_name(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomic(tmp_path / "f", b"new")
    assert caught.value.filename == str(tmp_path / "f")


def test_bytes_that_read_back_differently_are_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "read", lambda descriptor, size: b"rot"[:size])
    with pytest.raises(DamagedFileError, match="check the disk"):
        write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_atomic(tmp_path / "f", b"new")
    assert events == [".f.tmp", "rename", tmp_path.name]
