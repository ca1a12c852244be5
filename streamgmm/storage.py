"""The one way files are written: whole or not at all.

A file appears under its name only after its bytes were written beside it, flushed to the device, read back and
compared; the rename is then made durable by flushing the folder. A process killed at any instant leaves either the
old file or the new one, and at worst a temporary file that the next write to the same name replaces.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from streamgmm.errors import DamagedFileError, DataError

Tensors = Mapping[str, np.ndarray]


def write_atomic(path: Path, payload: bytes) -> None:
    """Write ``payload`` to ``path`` so that no reader ever sees a part of it.

    Raises
    ------
    OSError
        The folder cannot be written, or the device is full; ``path`` is then as it was before.
    DamagedFileError
        The bytes read back differ from those written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if hashlib.sha256(temporary.read_bytes()).digest() != hashlib.sha256(payload).digest():
            raise DamagedFileError(f"{path}: the bytes read back differ from those written; check the disk")
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the file being written; a failed write itself does not know it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, object]) -> None:
    """Save named arrays and JSON metadata as one safetensors file with a checksum over both."""
    # Not ascontiguousarray, which gives a scalar an axis.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    header = {"streamgmm": text, "checksum": _checksum(arrays, text)}
    write_atomic(path, safetensors_save(arrays, metadata=header))


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Load what `save_tensors` wrote, after verifying its checksum. Runs no code from the file.

    Raises
    ------
    DataError
        ``path`` does not exist or cannot be read.
    DamagedFileError
        The file is truncated, altered, or was not written by `save_tensors`.
    """
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        tensors = safetensors_load(payload)
        header_length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + header_length]).get("__metadata__") or {}
        text, checksum = header["streamgmm"], header["checksum"]
        metadata = json.loads(text)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError, RecursionError):
        raise DamagedFileError(f"{path}: not a whole streamgmm file; restore it from a copy") from None
    if checksum != _checksum(tensors, text) or not isinstance(metadata, dict):
        raise DamagedFileError(f"{path}: its checksum does not match its contents; restore it from a copy")
    return tensors, metadata


def _checksum(tensors: Tensors, metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"|{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
