"""A view of a Zarr store in which what is missing is an error, never zeros."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr
from crc32c import crc32c
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.buffer.cpu import buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, WrapperStore

ZarrArray: TypeAlias = "zarr.Array[Any]"

METADATA_KEYS = {"zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata"}

BLOSC_HEADER = 16

ABSENT = np.uint64(2**64 - 1)
"""A shard index's sentinel for an inner chunk that was never written."""

PIECES_LISTED = 20
"""Missing pieces that a message names."""

MISSING_REMEDY = "restore it, or write the array with write_empty_chunks=True if its writer left zeros out"


class DamagedStoreError(Exception):
    """A piece of an array is missing or cut short; the message names its key."""


class StrictStore(WrapperStore[Store]):
    """Delegates to a store, and raises where Zarr would go on with fill values.

    zarr-python takes three things for "never written, all fill value": a key without an object, a shard of zero bytes,
    and a range past the end of a shard. And numcodecs decodes a truncated Blosc chunk without an error, from whatever
    memory lies behind it: with ``whole_blosc``, set where every key is one Blosc frame, its length is compared with its
    header first.
    """

    whole_blosc = False

    @property
    def inner(self) -> Store:
        """The store that this is a view of."""
        return self._store

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        piece = await self._store.get(key, prototype, byte_range)
        if key.rsplit("/", 1)[-1] in METADATA_KEYS:
            return piece
        if piece is None:
            raise DamagedStoreError(f"{key} is missing; {MISSING_REMEDY}")
        wanted = 1
        if isinstance(byte_range, RangeByteRequest):
            wanted = byte_range.end - byte_range.start
        elif isinstance(byte_range, SuffixByteRequest):
            wanted = byte_range.suffix
        if len(piece) < wanted:
            raise DamagedStoreError(f"{key} is truncated; restore it")
        if self.whole_blosc and byte_range is None:
            frame = int.from_bytes(piece[12:BLOSC_HEADER].to_bytes(), "little")
            if len(piece) < BLOSC_HEADER or len(piece) != frame:
                raise DamagedStoreError(
                    f"{key} is truncated or damaged: no Blosc frame of {len(piece)} bytes; restore it"
                )
        return piece


def piece_shape(array: ZarrArray) -> tuple[int, int]:
    """Rows and features of what lies under one key: a shard, or a chunk where there are no shards."""
    rows, features = array.shards or array.chunks
    return rows, features


def piece_grid(array: ZarrArray) -> tuple[int, int]:
    """How many pieces there are along the rows and along the features."""
    (n, d), (rows, features) = array.shape, piece_shape(array)
    return -(-n // rows), -(-d // features)


def piece_key(array: ZarrArray, i: int, j: int) -> str:
    """The store's key of piece (i, j)."""
    key = array.metadata.encode_chunk_key((i, j))
    return f"{array.path}/{key}" if array.path else key


def is_blosc(array: ZarrArray) -> bool:
    """Whether what lies under one key is one Blosc frame."""
    if array.metadata.zarr_format == 2:
        return getattr(array.metadata.compressor, "codec_id", None) == "blosc"
    return isinstance(array.metadata.codecs[-1], BloscCodec)


def find_missing_pieces(array: ZarrArray, store: Store) -> tuple[int, list[tuple[int, int]]]:
    """How many pieces the store lacks, from one listing of it, and which (i, j): the first `PIECES_LISTED`.

    A store that cannot list seems to lack none: `StrictStore` then finds out when the piece is read.
    """
    if not store.supports_listing:
        return 0, []
    (height, width), present = piece_grid(array), []
    for key in _list_keys(store, array.path):
        match = re.fullmatch(r"(?:c[./])?(\d+)[./](\d+)", key)
        if match:
            i, j = int(match[1]), int(match[2])
            if i < height and j < width and array.metadata.encode_chunk_key((i, j)) == key:
                present.append(i * width + j)
    # What is allocated follows what is there, never what the metadata promises.
    held = np.unique(np.asarray(present, dtype=np.int64)).tolist()
    edges = pairwise([-1, *held, height * width])
    missing = (divmod(number, width) for before, after in edges for number in range(before + 1, after))
    return height * width - len(held), list(islice(missing, PIECES_LISTED))


def _list_keys(store: Store, path: str) -> Iterable[str]:
    """All keys below ``path``, relative to it."""
    if isinstance(store, LocalStore):
        # Not the store's own listing, which asks the file system about every single file.
        return _walk_keys(str(Path(store.root, path)))
    prefix = f"{path}/" if path else ""

    async def collect() -> list[str]:
        return [key.removeprefix(prefix) async for key in store.list_prefix(prefix)]

    return sync(collect())


def _walk_keys(root: str) -> Iterator[str]:
    """All files below ``root``, relative to it.

    Raises
    ------
    DamagedStoreError
        A symbolic link leads out of ``root``: data from a stranger could name any file of this machine.
    """
    real, followed, folders = os.path.realpath(root), set[str](), [""]
    while folders:
        inside = folders.pop()
        with os.scandir(Path(root, inside)) as entries:
            for entry in entries:
                key = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if os.path.commonpath((real, target)) != real:
                        raise DamagedStoreError(f"{key} is a link out of its folder, to {target}; copy the file there")
                    if target in followed:  # a link to where another one led, perhaps in a circle
                        continue
                    followed.add(target)
                if entry.is_dir():
                    folders.append(key)
                else:
                    yield key


def sharding(array: ZarrArray) -> ShardingCodec | None:
    """The array's sharding codec, where it has one.

    Raises
    ------
    DamagedStoreError
        Sharding whose index cannot be checked: nested, wrapped in other codecs, or with an unusual index.
    """
    codecs = getattr(array.metadata, "codecs", ())
    found = [codec for codec in codecs if isinstance(codec, ShardingCodec)]
    if not found:
        return None
    codec = found[0]
    plain = len(codecs) == 1 and not any(isinstance(inner, ShardingCodec) for inner in codec.codecs)
    index, *checks = codec.index_codecs
    little = isinstance(index, BytesCodec) and index.to_dict()["configuration"] == {"endian": "little"}
    if not plain or not little or len(checks) > 1 or not all(isinstance(check, Crc32cCodec) for check in checks):
        raise DamagedStoreError("its sharding is nested or has an unusual index; write it again with zarr.create_array")
    return codec


@dataclass(frozen=True)
class ShardIndex:
    """Which bytes of a shard its index takes, and the inner chunks that it lists.

    Attributes
    ----------
    grid : (int, int)
        Inner chunks of a whole shard, along rows and features.
    at_start : bool
    checked : bool
        Whether a CRC-32C follows it.
    """

    grid: tuple[int, int]
    at_start: bool
    checked: bool

    @classmethod
    def of(cls, array: ZarrArray, codec: ShardingCodec) -> ShardIndex:
        rows, features = piece_shape(array)
        grid = rows // codec.chunk_shape[0], features // codec.chunk_shape[1]
        return cls(grid, codec.index_location.value == "start", len(codec.index_codecs) == 2)

    @property
    def table_bytes(self) -> int:
        return 16 * self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        return self.table_bytes + 4 * self.checked

    def offset(self, key: str, size: int) -> int:
        """Where the index begins in a shard of ``size`` bytes.

        Raises
        ------
        DamagedStoreError
            The shard is smaller than its index.
        """
        if size < self.length:
            raise DamagedStoreError(f"{key} is truncated: {size} bytes are less than its index; restore it")
        return 0 if self.at_start else size - self.length

    def parse(self, raw: bytes, size: int, key: str, present: tuple[int, int], first_row: int, rows: int) -> np.ndarray:
        """Offset and length of the ``present`` inner chunks within the array, shape (rows, columns, 2), uint64.

        ``first_row`` is the shard's, ``rows`` those of an inner chunk, both for messages. Chunks wholly outside the
        array are never written.

        Raises
        ------
        DamagedStoreError
            The index is cut short or fails its checksum, lacks a chunk, or points past the shard's end.
        """
        if len(raw) < self.length:
            raise DamagedStoreError(f"{key} is truncated; restore it")
        table_bytes = self.table_bytes
        if self.checked and crc32c(raw[:table_bytes]) != int.from_bytes(raw[table_bytes:], "little"):
            raise DamagedStoreError(f"{key}: its index fails its checksum, it is damaged or truncated; restore it")
        table = np.frombuffer(raw[:table_bytes], dtype="<u8").reshape(*self.grid, 2)[: present[0], : present[1]]
        offsets, lengths = table[..., 0], table[..., 1]
        absent = (offsets == ABSENT) | (lengths == 0)
        if absent.any():
            row, column = (int(index[0]) for index in np.nonzero(absent))
            raise DamagedStoreError(
                f"{key} lacks inner chunk ({row}, {column}), which holds rows from {first_row + row * rows} on; "
                f"{MISSING_REMEDY}"
            )
        total = np.uint64(size)
        if (offsets > total).any() or (lengths > total - np.minimum(offsets, total)).any():
            raise DamagedStoreError(f"{key} is truncated: its index points past its {size} bytes; restore it")
        return table


def inner_grid(array: ZarrArray, i: int, j: int) -> tuple[int, int]:
    """How many inner chunks of shard (i, j) lie within the array, along rows and features."""
    (rows, features), (inner_rows, inner_features) = piece_shape(array), array.chunks
    return (
        min(rows // inner_rows, -(-(array.shape[0] - i * rows) // inner_rows)),
        min(features // inner_features, -(-(array.shape[1] - j * features) // inner_features)),
    )


def check_shard(array: ZarrArray, index: ShardIndex, store: Store, i: int, j: int) -> int:
    """Read the index of shard (i, j), see that every inner chunk inside the array is there, and give the shard's size.

    Raises
    ------
    DamagedStoreError
        The shard or one of its inner chunks is missing, cut short, or its index fails its checksum.
    """
    key = piece_key(array, i, j)
    try:
        size = sync(store.getsize(key))
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{key} is missing; {MISSING_REMEDY}") from error
    start = index.offset(key, size)
    piece = sync(store.get(key, buffer_prototype, RangeByteRequest(start, start + index.length)))
    raw = piece.to_bytes() if piece is not None else b""
    index.parse(raw, size, key, inner_grid(array, i, j), i * piece_shape(array)[0], array.chunks[0])
    return size
