from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgmm.errors import DataError
from streamgmm.io.direct import ALIGNMENT, SCRATCH_BYTES, fill_direct
from streamgmm.io.sources.raw import RawFile

SIZE = 3 * ALIGNMENT + 777
CONTENT = np.random.default_rng(0).integers(256, size=SIZE, dtype=np.uint8)


def aligned(size: int, offset: int) -> np.ndarray:
    """``size`` bytes that begin ``offset`` bytes behind an aligned address."""
    memory = np.zeros(size + 2 * ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT + offset
    return memory[begin : begin + size]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT.tobytes())
    return tmp_path / "file"


@given(
    start=st.integers(0, SIZE - 1) | st.sampled_from([0, ALIGNMENT, 2 * ALIGNMENT]),
    length=st.integers(0, SIZE) | st.sampled_from([ALIGNMENT, 2 * ALIGNMENT, SIZE]),
    offset=st.sampled_from([0, 1, 512, 777]),
    most=st.sampled_from([None, ALIGNMENT, 512, 700]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_into_any_memory_with_short_reads(path, start, length, offset, most):
    """The kernel is stood in for: no file system here may refuse or shorten what a device would not."""
    asked: list[tuple[int, int]] = []

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        asked.append((position, len(buffers[0])))
        address = np.frombuffer(buffers[0], np.uint8).ctypes.data
        assert position % ALIGNMENT == len(buffers[0]) % ALIGNMENT == address % ALIGNMENT == 0
        rest = CONTENT[position : position + len(buffers[0])]
        # Cut short at first, and by less when the same place is asked for again.
        rest = rest if most is None else rest[: max(most, start % ALIGNMENT + 1) * asked.count(asked[-1])]
        buffers[0][: len(rest)] = rest.tobytes()
        return len(rest)

    out = aligned(length, offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        done = fill_direct(-1, start, out)
    assert done <= min(length, SIZE - start)
    assert most is not None or done == min(length, SIZE - start)
    assert np.array_equal(out[:done], CONTENT[start : start + done])


def test_more_than_scratch_holds(tmp_path):
    content = np.random.default_rng(1).integers(256, size=2 * SCRATCH_BYTES + 99, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    file = RawFile(tmp_path / "file")
    out = aligned(len(content) - 5, 3)
    file.read_uncached(5, out)
    assert np.array_equal(out, content[5:])


def test_past_the_end_is_truncation(path):
    file = RawFile(path)
    with pytest.raises(DataError, match=rf"ends at byte {SIZE}, 100 bytes too early"):
        file.read_uncached(SIZE - 50, np.empty(150, np.uint8))


@pytest.mark.parametrize("at", ["open", "read"])
def test_a_file_system_that_refuses(path, monkeypatch, at):
    opened, read, forgotten = os.open, os.preadv, []

    def refuse_open(name, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(name, flags, *more)

    file = RawFile(path)
    plain = file.extent(0, 1).descriptor

    def refuse_read(descriptor, buffers, position):
        if descriptor != plain:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, buffers, position)

    if at == "open":
        monkeypatch.setattr(os, "open", refuse_open)
    else:
        monkeypatch.setattr(os, "preadv", refuse_read)
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: forgotten.append(advice))
    for _ in range(2):
        out = np.empty(1000, np.uint8)
        word = file.read_uncached(10, out)
        assert np.array_equal(out, CONTENT[10:1010])
        assert "O_DIRECT is refused (Invalid argument)" in word
    assert forgotten == [(plain, 10, 1000, os.POSIX_FADV_DONTNEED)] * 2


def test_a_failing_device_names_file_and_offset(path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    file = RawFile(path)
    monkeypatch.setattr(os, "preadv", fail)
    for read in (file.read_into, file.read_uncached):
        with pytest.raises(DataError, match=r"file: read failed at byte 10 \(Input/output error\)"):
            read(10, np.empty(100, np.uint8))


def test_a_file_that_was_replaced_is_noticed(path):
    file = RawFile(path)
    path.unlink()
    path.write_bytes(CONTENT.tobytes())
    with pytest.raises(DataError, match="was replaced"):
        file.read_uncached(0, np.empty(10, np.uint8))


def test_descriptors_are_closed_with_their_owner(path):
    file = RawFile(path)
    file.read_uncached(0, np.empty(10, np.uint8))
    before = len(list(Path("/proc/self/fd").iterdir()))
    del file
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 2
    file = RawFile(path)
    extent = file.extent(0, 10)
    del file
    os.fstat(extent.descriptor)
    extent.owner.close()
    with pytest.raises(DataError):
        extent.owner.read_uncached(0, np.empty(10, np.uint8))
