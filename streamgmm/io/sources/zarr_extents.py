"""Zarr arrays whose chunks are rows as they are: which bytes of which file hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

from streamgmm.errors import DataError
from streamgmm.io.objects.store import RemoteFile, RemoteStore
from streamgmm.io.sources.base import STORED_DTYPES
from streamgmm.io.sources.extents import CHECKSUM_BYTES, ByteFile, Placement
from streamgmm.io.sources.raw import RawFile
from streamgmm.io.sources.zarr_store import (
    MISSING_REMEDY,
    DamagedStoreError,
    ShardIndex,
    ZarrArray,
    inner_grid,
    piece_key,
    piece_shape,
)

PIECES_OPEN = 512
"""Files, and their indexes, that are kept open: opening one takes as long as reading some MiB from the page cache."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """A shard, or a chunk where there are no shards, open for reading."""

    file: ByteFile
    offsets: NDArray[np.int64]


class ZarrExtents:
    """Where the rows of an array lie, for one of which `why_decoded` says nothing.

    Parameters
    ----------
    array : ZarrArray
    store : LocalStore or RemoteStore
    codec : ShardingCodec or None

    Attributes
    ----------
    checked : bool
        Whether every chunk has a checksum.
    """

    def __init__(self, array: ZarrArray, store: LocalStore | RemoteStore, codec: ShardingCodec | None) -> None:
        self._array, self._store = array, store
        self._index = None if codec is None else ShardIndex.of(array, codec)
        inner = codec.codecs if codec is not None else getattr(array.metadata, "codecs", ())
        self.checked = any(isinstance(step, Crc32cCodec) for step in inner)
        self._row_bytes = array.shape[1] * np.dtype(array.dtype).itemsize
        self._chunk_rows = int(array.chunks[0])
        self._chunk_bytes = self._chunk_rows * self._row_bytes
        self._stored_bytes = self._chunk_bytes + CHECKSUM_BYTES * self.checked
        self._piece = lru_cache(PIECES_OPEN)(self._open)

    def placements(self, start: int, stop: int) -> Iterator[Placement]:
        """Rows [start, stop), chunk by chunk.

        Raises
        ------
        DamagedStoreError
            A chunk or shard is missing, has the wrong size, or its index is damaged; found when it is opened.
        """
        rows, chunk_bytes, row_bytes = self._chunk_rows, self._chunk_bytes, self._row_bytes
        per_piece = piece_shape(self._array)[0] // rows
        row = start
        while row < stop:
            chunk = row // rows
            last = min(stop, (chunk + 1) * rows)
            piece = self._piece(chunk // per_piece)
            offset = int(piece.offsets[chunk % per_piece])
            yield Placement(
                piece.file,
                offset + (row - chunk * rows) * row_bytes,
                (last - row) * row_bytes,
                (row - start) * row_bytes,
                (offset, chunk_bytes) if self.checked else None,
            )
            row = last

    def close(self) -> None:
        """Let go of every file."""
        self._piece.cache_clear()

    def _open(self, i: int) -> _Piece:
        key = piece_key(self._array, i, 0)
        file = self._open_file(key)
        if self._index is None:
            self._check_length(key, "", file.size)
            return _Piece(file, np.zeros(1, np.int64))
        begin = self._index.offset(key, file.size)
        raw: np.ndarray = np.empty(self._index.length, np.uint8)
        file.read_into(begin, raw)
        present, first_row = inner_grid(self._array, i, 0), i * piece_shape(self._array)[0]
        table = self._index.parse(raw.tobytes(), file.size, key, present, first_row, self._chunk_rows)[:, 0]
        odd = np.flatnonzero(table[:, 1] != self._stored_bytes)
        if len(odd):
            self._check_length(key, f"inner chunk ({odd[0]}, 0) of ", int(table[odd[0], 1]))
        return _Piece(file, table[:, 0].astype(np.int64))

    def _open_file(self, key: str) -> ByteFile:
        try:
            if isinstance(self._store, RemoteStore):
                return RemoteFile(self._store, key)
            return RawFile(Path(self._store.root, key))
        except (DataError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
                raise DamagedStoreError(f"{key} is missing; {MISSING_REMEDY}") from error
            raise

    def _check_length(self, key: str, what: str, found: int) -> None:
        if found != self._stored_bytes:
            state = "truncated" if found < self._stored_bytes else "damaged"
            raise DamagedStoreError(
                f"{what}{key} is {state}: {found} bytes where {self._stored_bytes} are expected; restore it"
            )


def why_decoded(array: ZarrArray, store: Store, codec: ShardingCodec | None) -> str:
    """Why the chunks of ``array`` are not rows as they are; empty where they are."""
    if not isinstance(store, (LocalStore, RemoteStore)):
        return "it is in no local folder"
    if array.chunks[1] != array.shape[1]:
        return f"its chunks hold {array.chunks[1]} of {array.shape[1]} features"
    dtype = np.dtype(array.dtype)
    if array.metadata.zarr_format == 2:
        return _why_decoded_v2(array, dtype)
    steps = codec.codecs if codec is not None else array.metadata.codecs
    first, *others = steps
    if not isinstance(first, BytesCodec):
        return f"its chunks are encoded ({_codec_names(steps)})"
    if dtype.itemsize > 1 and first.to_dict().get("configuration") != {"endian": "little"}:
        return "its values are big-endian"
    if others and not (len(others) == 1 and isinstance(others[0], Crc32cCodec)):
        return f"its chunks are encoded ({_codec_names(others)})"
    return "" if dtype in STORED_DTYPES else f"{dtype} is converted"


def _why_decoded_v2(array: ZarrArray, dtype: np.dtype[np.generic]) -> str:
    metadata = array.metadata
    steps = [*(getattr(metadata, "filters", None) or ()), getattr(metadata, "compressor", None)]
    names = [str(getattr(step, "codec_id", step)) for step in steps if step is not None]
    if names:
        return f"its chunks are encoded ({', '.join(names)})"
    if getattr(metadata, "order", "C") != "C":
        return "its chunks are in Fortran order"
    if not dtype.isnative:
        return "its values are big-endian"
    return "" if dtype in STORED_DTYPES else f"{dtype} is converted"


def _codec_names(steps: object) -> str:
    assert isinstance(steps, (list, tuple))
    return ", ".join(str(step.to_dict()["name"]) for step in steps)
