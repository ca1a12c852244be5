"""Zarr arrays, version 3 (sharded or not) and version 2."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import zarr
from zarr.core.buffer.cpu import NDBuffer, buffer_prototype
from zarr.storage import LocalStore

from streamgmm.errors import DataError
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import Rows, Source, check_shape
from streamgmm.io.sources.raw import unreadable
from streamgmm.io.sources.zarr_store import (
    MISSING_REMEDY,
    DamagedStoreError,
    StrictStore,
    ZarrArray,
    check_shard,
    find_missing_piece,
    is_blosc,
    piece_grid,
    piece_key,
    piece_shape,
    sharding,
)

ARRAYS_LISTED = 8


class ZarrSource(Source):
    """Rows of a two-dimensional Zarr array, decoded by zarr-python.

    Every chunk or shard must exist: Zarr reads what is missing as its fill value, so data that was lost looks like
    zeros. Keys are compared with one listing of the store when it is opened, the chunks inside a shard when it is
    first read.

    Raises
    ------
    DataError
        No such array, a group, damaged metadata, another rank, not real numbers, or a missing chunk or shard.
    """

    read_path = "decode"

    def __init__(self, data: str | os.PathLike[str] | ZarrArray) -> None:
        self.name, strict, self._array = _reopen(data) if isinstance(data, zarr.Array) else _open_path(data)
        strict.whole_blosc = is_blosc(self._array)
        self._store = strict.inner
        self.dtype = stored_dtype(self.name, np.dtype(self._array.dtype))
        self.shape = check_shape(self.name, self._array.shape)
        _refuse_pickle(self.name, self._array)
        self.read_granule = int(self._array.chunks[0])
        try:
            self._sharding = sharding(self._array)
        except DamagedStoreError as error:
            raise DataError(f"{self.name}: {error}") from error
        try:
            missing = find_missing_piece(self._array, self._store)
        except OSError as error:
            raise unreadable(self.name, error) from error
        if missing is not None:
            key, row = piece_key(self._array, *missing), missing[0] * piece_shape(self._array)[0]
            raise DataError(f"{self.name}: {key}, which holds rows from {row} on, is missing; {MISSING_REMEDY}")
        # One flag a shard; threads may check a shard twice, which costs one small read.
        self._checked: np.ndarray = np.zeros(piece_grid(self._array) if self._sharding else (0, 0), dtype=bool)

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        if start >= stop:
            return
        try:
            self._decode(start, stop, out)
        except MemoryError:
            raise
        # Codecs raise whatever they like (ValueError, RuntimeError, zlib.error, EOFError, …) on damaged bytes.
        except Exception as error:
            first, last, cause = self._narrow(start, stop, error)
            reason = " ".join(str(cause).split())[:200] or type(cause).__name__
            remedy = "" if isinstance(cause, DamagedStoreError) else "; restore it or write it again"
            raise DataError(f"{self.name}: rows {first} to {last - 1} cannot be read: {reason}{remedy}") from error

    def _decode(self, start: int, stop: int, out: Rows) -> None:
        if self._sharding is not None:
            rows = piece_shape(self._array)[0]
            for i in range(start // rows, (stop - 1) // rows + 1):
                for j in range(self._checked.shape[1]):
                    if not self._checked[i, j]:
                        check_shard(self._array, self._sharding, self._store, i, j)
                        self._checked[i, j] = True
        # The buffer wraps ``out``: Zarr writes each decoded chunk into its place.
        self._array.get_basic_selection(
            (slice(start, stop), slice(None)), out=NDBuffer.from_numpy_array(out), prototype=buffer_prototype
        )

    def _narrow(self, start: int, stop: int, error: Exception) -> tuple[int, int, Exception]:
        """The stored chunk within rows [start, stop) whose decoding fails, and how."""
        for granule in range(start // self.read_granule, (stop - 1) // self.read_granule + 1):
            first = max(start, granule * self.read_granule)
            last = min(stop, (granule + 1) * self.read_granule)
            try:
                self._decode(first, last, np.empty((last - first, self.shape[1]), dtype=self.dtype))
            except Exception as cause:
                return first, last, cause
        return start, stop, error


def group_refused(name: str, group: zarr.Group) -> DataError:
    """The one-line error for a group where an array is needed: it lists the arrays inside."""
    try:
        # Zarr warns of every folder that it does not know; one line of error is enough.
        with warnings.catch_warnings(action="ignore"):
            arrays = sorted(key for key, _ in group.arrays())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return DataError(f"{name}: is a Zarr group whose members cannot be listed ({error}); name an array inside")
    listed = ", ".join(arrays[:ARRAYS_LISTED]) + (", …" if len(arrays) > ARRAYS_LISTED else "")
    example = f", for example {name.rstrip('/')}/{arrays[0]}" if arrays else ""
    return DataError(
        f"{name}: is a Zarr group, not an array; its arrays: {listed or 'none'}; name the array inside{example}"
    )


def _open_path(path: str | os.PathLike[str]) -> tuple[str, StrictStore, ZarrArray]:
    """A folder as (name, the store itself, the array seen through a strict view of it)."""
    name = os.fspath(path)
    try:
        Path(name).stat()
        strict = StrictStore(LocalStore(name, read_only=True))
        node = zarr.open(strict, mode="r")
    except FileNotFoundError as error:
        if Path(name).exists():
            raise DataError(f"{name}: holds no zarr.json or .zarray; give the folder of a Zarr array") from error
        raise unreadable(name, error) from error
    except OSError as error:
        raise unreadable(name, error) from error
    # Damaged metadata surfaces as JSONDecodeError, KeyError, TypeError, …, whichever field is read first.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{name}: its Zarr metadata cannot be used ({reason}); restore zarr.json or .zarray") from error
    if isinstance(node, zarr.Group):
        raise group_refused(name, node)
    return name, strict, node


def _reopen(array: ZarrArray) -> tuple[str, StrictStore, ZarrArray]:
    """An open array as (name, its store, the same array seen through a strict view of the store)."""
    store = array.store
    name = str(Path(store.root, array.path)) if isinstance(store, LocalStore) else str(array.store_path)
    strict = StrictStore(store)
    try:
        # "r+" asks for nothing to be written; "r" would need every writable store to make a read-only copy of itself.
        mode: Literal["r", "r+"] = "r" if store.read_only else "r+"
        again = zarr.open_array(strict, path=array.path, mode=mode, zarr_format=array.metadata.zarr_format)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{name}: can no longer be opened ({reason}); open the array again") from error
    return name, strict, again


def _refuse_pickle(name: str, array: ZarrArray) -> None:
    """A version 2 array may name pickle as a codec, whose decoding runs code from the file."""
    codecs = [*(getattr(array.metadata, "filters", None) or ()), getattr(array.metadata, "compressor", None)]
    if any(getattr(codec, "codec_id", None) == "pickle" for codec in codecs):
        raise DataError(f"{name}: is encoded with pickle, which is never loaded; write it again without that filter")
