"""The one way files are written: whole or not at all; and how they are read back: as if a stranger had made them.

A file appears under its name only after its bytes were written beside it, flushed to the device, read back from there
and compared; the rename is then made durable by flushing the folder. A process killed at any instant leaves either the
old file or the new one, and at worst a temporary file that the next write to the same name replaces.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load

from streamgmm.errors import DamagedFileError, DataError, RequestError

Tensors = Mapping[str, np.ndarray]

Pieces = Sequence[bytes | memoryview]

_PART_BYTES = 1 << 20
_LENGTH_BYTES = 8
_HEADER_LIMIT = 100_000_000
"""The format's own limit on its JSON header."""

_TYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "|i1": "I8", "|u1": "U8", "|b1": "BOOL"}
"""The format's names of the types that are written here."""


_MALFORMED = (
    *(SafetensorError, MemoryError, RecursionError, OverflowError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
)
"""What parsing something that is not what it says can raise."""


def write_atomic(path: Path, *pieces: bytes | memoryview) -> None:
    """Write ``pieces``, one behind the other, to ``path`` so that no reader ever sees a part of it.

    Raises
    ------
    OSError
        The folder cannot be written, or the device is full; ``path`` is then as it was before.
    DamagedFileError
        The bytes read back differ from those written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            _write_durably(temporary, pieces)
            if not _holds(temporary, pieces):
                raise DamagedFileError(f"{path}: the bytes read back differ from those written; check the disk")
            os.replace(temporary, path)  # noqa: PTH105 - `os` is the seam at which tests inject faults
            sync_folder(path.parent)
    except BaseException:
        # What went wrong first is what a person must hear.
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise


def _write_durably(path: Path, pieces: Pieces) -> None:
    """A new file that nobody else can open before it is complete."""
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - left by a killed process, or a link laid by a stranger
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for piece in _cut(pieces):
            while len(piece):
                piece = piece[os.write(descriptor, piece) :]
        os.fchmod(descriptor, 0o666 & ~_UMASK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(path: Path, pieces: Pieces) -> bool:
    """Whether the device gives ``pieces`` back; the page cache is told to forget them first."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for piece in _cut(pieces):
            while len(piece):
                there = os.read(descriptor, len(piece))
                if not there or there != bytes(piece[: len(there)]):
                    return False
                piece = piece[len(there) :]
        return not os.read(descriptor, 1)
    finally:
        os.close(descriptor)


def _cut(pieces: Pieces) -> Iterator[memoryview]:
    """``pieces`` in parts small enough that no thread holds the interpreter for long, and large enough to be few."""
    gathered = bytearray()
    for piece in pieces:
        if len(gathered) + len(piece) <= _PART_BYTES:
            gathered += piece
            continue
        yield memoryview(bytes(gathered))
        gathered.clear()
        view = memoryview(piece)
        yield from (view[start : start + _PART_BYTES] for start in range(0, len(view), _PART_BYTES))
    yield memoryview(bytes(gathered))


def _damaged(path: Path | str) -> DamagedFileError:
    return DamagedFileError(f"{path}: not a whole streamgmm file; restore it from a copy")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Read once: it can only be read by setting it, which is seen by every thread."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the file being written; a failed write itself does not know it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def require_folder(output: Path) -> None:
    """Raise RequestError where the folder that ``output`` is to be written to does not exist."""
    if not output.parent.is_dir():
        raise RequestError(f"{output}: its folder does not exist; create {output.parent}, or name another output")


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, object]) -> None:
    """Save named arrays and JSON metadata as one safetensors file with a checksum over both."""
    # Not ascontiguousarray, which gives a scalar an axis.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    facts = {"streamgmm": text, "checksum": _checksum(arrays, text)}
    # Written from where they are: the library would copy them twice, and sums may take most of the memory allowed.
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    write_atomic(path, _header(arrays, ordered, facts), *(_bytes_of(arrays[name]) for name in ordered))


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Load what `save_tensors` wrote, after verifying its checksum. Runs no code from the file.

    Raises
    ------
    DataError
        ``path`` does not exist or cannot be read.
    DamagedFileError
        The file is truncated, altered, or was not written by `save_tensors`.
    """
    return _verified(path, *_read_whole(path))


def parse_tensors(name: str, payload: bytes) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """As `load_tensors`, from the bytes of such a file; ``name`` is for messages.

    Raises
    ------
    DamagedFileError
        They are no whole file.
    """
    try:
        header = _read_header(BytesIO(payload), len(payload))[1]
    except _MALFORMED:
        raise _damaged(name) from None
    return _verified(name, payload, header)


def _verified(
    path: Path | str, payload: bytes, header: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    try:
        facts = header["__metadata__"]
        text, checksum = facts["streamgmm"], facts["checksum"]
        metadata = parse_json(text)
        tensors = safetensors_load(payload)
    except _MALFORMED:
        raise _damaged(path) from None
    if checksum != _checksum(tensors, text) or not isinstance(metadata, dict):
        raise DamagedFileError(f"{path}: its checksum does not match its contents; restore it from a copy")
    return tensors, metadata


def read_small(path: Path) -> bytes:
    """A text that a person might have written.

    Raises
    ------
    OSError
        There is none, it cannot be read, or it is no regular file or too large to be one.
    """
    with _open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _HEADER_LIMIT:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return file.read(_HEADER_LIMIT)


def parse_json(text: str | bytes) -> object:
    """JSON, without the NaN that Python's parser adds to it.

    Raises
    ------
    ValueError, RecursionError
        It is not JSON, or nested too deep.
    """
    return json.loads(text, parse_constant=_constant)


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no JSON value")
    return float(name.replace("Infinity", "inf"))


def _read_whole(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file whose own header accounts for every one, and that header; raises as `load_tensors`."""
    try:
        with _open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head, header = _read_header(file, size)
            rest = size - len(head)
            if rest > _memory_bytes() // 2:
                raise OSError(errno.ENOMEM, f"its {rest} bytes do not fit into memory")
            return head + file.read(rest), header
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and the device") from None
    except _MALFORMED:
        raise _damaged(path) from None


def _open_regular(path: Path) -> BinaryIO:
    """``path`` for reading. Raises OSError, also for what is no regular file."""
    try:
        # Not blocking: opening a FIFO would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _read_header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, as bytes and parsed; raises one of `_MALFORMED` where it belies the size."""
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if length > min(_HEADER_LIMIT, size - _LENGTH_BYTES):
        raise ValueError("the header is longer than the file")
    text = file.read(length)
    header: Any = parse_json(text)
    ends = [facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"]
    if _LENGTH_BYTES + length + max(ends, default=0) != size:
        raise ValueError("the header does not account for the file's size")
    return start + text, header


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _header(arrays: Tensors, ordered: list[str], facts: Mapping[str, str]) -> bytes:
    """What stands before the arrays in a safetensors file; the widest type comes first, so that all are aligned."""
    ends = list(accumulate((arrays[name].nbytes for name in ordered), initial=0))
    places = {
        name: {"dtype": _TYPES[arrays[name].dtype.str], "shape": arrays[name].shape, "data_offsets": ends[i : i + 2]}
        for i, name in enumerate(ordered)
    }
    text = json.dumps({"__metadata__": facts, **places}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _checksum(tensors: Tensors, metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"|{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(_bytes_of(array))
    return digest.hexdigest()
