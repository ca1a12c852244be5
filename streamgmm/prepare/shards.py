"""Sharded Zarr v3 arrays as the loader reads them fastest: the array's metadata by zarr, one shard a file by us.

zarr-python writes a shard from an array that holds all of it, and in place. Here a shard is written as its rows come,
to a temporary name, with its digest, and renamed when it is whole: uncompressed inner chunks, each followed by its
CRC-32C, then the index of offsets and lengths and its CRC-32C (Zarr v3, "sharding_indexed").
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from crc32c import crc32c
from zarr.codecs import Crc32cCodec

from streamgmm.errors import RequestError
from streamgmm.statistics import BLOCK_ROWS
from streamgmm.storage import naming

CHUNK_BYTES = 1 << 20
"""An inner chunk is what is read at least at once, and small enough to be compared with its checksum in the cache."""

SHARD_BYTES = 64 << 20

_ABSENT = 2**64 - 1


@dataclass(frozen=True)
class Layout:
    """Rows of an array, and how they are divided among chunks and shards.

    Attributes
    ----------
    shape : (N, d) or (N,)
    dtype : str
    chunk_rows, shard_rows : int
        A chunk divides a block of 65,536 rows or is a number of them, so a loader's chunks are whole inner chunks.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str, shard_bytes: int) -> Layout:
        """For rows of ``shape``; shards of about ``shard_bytes``."""
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        fits = max(1, min(CHUNK_BYTES, shard_bytes) // row_bytes)
        chunk_rows = min(BLOCK_ROWS, 1 << (fits.bit_length() - 1))
        chunks = max(1, min(shard_bytes // (chunk_rows * row_bytes), -(-shape[0] // chunk_rows)))
        return cls(shape, dtype, chunk_rows, chunk_rows * chunks)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def n_shards(self) -> int:
        return -(-self.shape[0] // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Rows [start, stop) of a shard."""
        return shard * self.shard_rows, min(self.shape[0], (shard + 1) * self.shard_rows)

    def key(self, shard: int) -> str:
        """Its file, relative to the array's folder."""
        return "/".join(["c", str(shard), *("0" for _ in self.shape[1:])])

    def stored_bytes(self) -> int:
        """Of all shards, with checksums and indexes."""
        chunks = -(-self.shape[0] // self.chunk_rows)
        index = 16 * (self.shard_rows // self.chunk_rows) + 4
        return chunks * (self.chunk_rows * self.row_bytes + 4) + self.n_shards * index


def create_array(path: Path, layout: Layout, attributes: dict[str, Any]) -> None:
    """Write the metadata of an array, atomically; shards that are there stay."""
    aside = temporary_name(path)
    with naming(path):
        zarr.create_array(
            aside,
            shape=layout.shape,
            dtype=layout.dtype,
            chunks=(layout.chunk_rows, *layout.shape[1:]),
            shards=(layout.shard_rows, *layout.shape[1:]),
            compressors=[Crc32cCodec()],
            attributes=attributes,
            config={"write_empty_chunks": True},
        )
        path.mkdir(exist_ok=True)
        (aside / "zarr.json").replace(path / "zarr.json")
        shutil.rmtree(aside)


class ShardWriter:
    """Takes the rows of one shard in order; leaving without an error gives it its name.

    Attributes
    ----------
    digest : str
        SHA-256 of the file, once it is whole.
    """

    def __init__(self, path: Path, layout: Layout, rows: int) -> None:
        self._path, self._layout, self._rows = path, layout, rows
        self._temporary = temporary_name(path)
        self._chunk: np.ndarray = np.zeros((layout.chunk_rows, *layout.shape[1:]), np.dtype(layout.dtype))
        self._filled = self._written = 0
        self._index: list[tuple[int, int]] = []
        self._sha = hashlib.sha256()
        self.digest = ""
        self.size = 0

    def __enter__(self) -> ShardWriter:
        with naming(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb", buffering=0)
        return self

    def write(self, rows: np.ndarray) -> None:
        """Append ``rows``, of the layout's type and width."""
        while len(rows):
            count = min(len(rows), len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + count] = rows[:count]
            self._filled += count
            rows = rows[count:]
            if self._filled == len(self._chunk):
                self._put_chunk()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming(self._path):
                with self._file:
                    if kind is None:
                        self._finish()
                if kind is None:
                    self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._filled:
            self._chunk[self._filled :] = 0  # Zarr pads the last chunk of an array
            self._put_chunk()
        if self._written != self._rows:
            raise RequestError(
                f"{self._path}: {self._written} rows came where {self._rows} were counted; the source changed "
                "meanwhile, start over with --fresh"
            )
        per_shard = self._layout.shard_rows // self._layout.chunk_rows
        absent = [(_ABSENT, _ABSENT)] * (per_shard - len(self._index))
        table = np.array([*self._index, *absent], dtype="<u8").tobytes()
        self._put(table)
        self._put(crc32c(table).to_bytes(4, "little"))
        self.digest = self._sha.hexdigest()
        os.fsync(self._file.fileno())

    def _put_chunk(self) -> None:
        content = self._chunk.reshape(-1).view(np.uint8)
        self._index.append((self.size, len(content) + 4))
        self._put(content.data)
        self._put(crc32c(content.data).to_bytes(4, "little"))
        self._written += self._filled
        self._filled = 0

    def _put(self, piece: bytes | memoryview) -> None:
        put_all(self._file.fileno(), piece)
        self._sha.update(piece)
        self.size += len(piece)


def put_all(descriptor: int, piece: bytes | memoryview) -> None:
    """Write all of ``piece``."""
    view = memoryview(piece)
    while len(view):
        view = view[os.write(descriptor, view) :]


def temporary_name(path: Path) -> Path:
    """Beside ``path``, like no other: what a task that was given up still writes is never what another one renames."""
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
