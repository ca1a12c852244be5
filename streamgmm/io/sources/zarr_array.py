"""Zarr arrays, version 3 (sharded or not) and version 2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.buffer.cpu import NDBuffer, buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from streamgmm.errors import DataError, RequestError
from streamgmm.io.objects.cache import Cache
from streamgmm.io.objects.store import RemoteStore
from streamgmm.io.objects.urls import open_store, scheme_of
from streamgmm.io.plan import Extent
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import Recipe, Rows, check_shape
from streamgmm.io.sources.extents import ExtentSource, Placement
from streamgmm.io.sources.raw import RawFile, unreadable
from streamgmm.io.sources.zarr_extents import ZarrExtents, why_decoded
from streamgmm.io.sources.zarr_store import (
    MISSING_REMEDY,
    DamagedStoreError,
    ShardIndex,
    StrictStore,
    ZarrArray,
    check_shard,
    find_missing_pieces,
    is_blosc,
    piece_grid,
    piece_key,
    piece_shape,
    sharding,
)
from streamgmm.io.wording import reason_of
from streamgmm.transforms import FILE, Transformation

ARRAYS_LISTED = 8


class ZarrSource(ExtentSource):
    """Rows of a two-dimensional Zarr array, in a folder, in an object store, or wherever zarr finds it.

    Chunks that hold whole rows as they are, in a local folder or an object store, with or without a CRC-32C, in shards
    or not, are read straight into place; all others are decoded, by zarrs where it is installed and faster (local
    shards), else by zarr-python.

    Every chunk or shard must exist: Zarr reads what is missing as its fill value, so data that was lost looks like
    zeros. Keys are compared with one listing of the store when it is opened, the chunks inside a shard when it is
    first read.

    Raises
    ------
    DataError
        No such array, a group, damaged metadata, another rank, not real numbers, a missing chunk or shard, or a link
        out of the folder.
    """

    _objects: object = None

    def __init__(self, data: str | os.PathLike[str] | ZarrArray, cache: Cache | None = None) -> None:
        self.name, strict, self._array = _reopen(data) if isinstance(data, zarr.Array) else _open_path(data, cache)
        if isinstance(data, zarr.Array) and isinstance(strict.inner, LocalStore):
            self.opened_by = Recipe(ZarrSource, (str(Path(self.name).absolute()),))
        strict.whole_blosc = is_blosc(self._array)
        self._store = strict.inner
        self.dtype = stored_dtype(self.name, np.dtype(self._array.dtype))
        self.shape = check_shape(self.name, self._array.shape)
        self.transformation = _transformation(self.name, self._array, self._store)
        _refuse_pickle(self.name, self._array)
        _check_chunks(self.name, self._array)
        try:
            codec = sharding(self._array)
            if isinstance(self._store, RemoteStore):
                prefix = f"{self._array.path}/" if self._array.path else ""
                self._objects = self._store.survey(prefix)
            count, missing = find_missing_pieces(self._array, self._store)
        except DamagedStoreError as error:
            raise DataError(f"{self.name}: {error}") from error
        except OSError as error:
            raise unreadable(self.name, error) from error
        if missing:
            key, row = piece_key(self._array, *missing[0]), missing[0][0] * piece_shape(self._array)[0]
            others = ", ".join(piece_key(self._array, *piece) for piece in missing[1:])
            more = ", …" if count > len(missing) else ""
            listed = f", and {count - 1} more ({others}{more})" if others else ""
            raise DataError(f"{self.name}: {key}, which holds rows from {row} on, is missing{listed}; {MISSING_REMEDY}")
        self._index = None if codec is None else ShardIndex.of(self._array, codec)
        self._extents: ZarrExtents | None = None
        self.slow_because = why_decoded(self._array, self._store, codec)
        if isinstance(self._store, (LocalStore, RemoteStore)) and not self.slow_because:
            self._extents = ZarrExtents(self._array, self._store, codec)
            if isinstance(self._store, RemoteStore):
                self.read_path = "objects"
            self.read_granule = int(self._array.chunks[0]) if self._extents.checked else 1
            return
        self.read_path = "decode"
        self.read_granule = int(self._array.chunks[0])
        self._decoder = _with_zarrs(self._array, self._store) if codec is not None else None
        # The size of each shard that was checked; threads may check a shard twice, which costs one small read.
        self._sizes: np.ndarray = np.zeros(piece_grid(self._array) if codec is not None else (0, 0), dtype=np.int64)

    def placements(self, start: int, stop: int) -> Iterable[Placement]:
        assert self._extents is not None
        return self._extents.placements(start, stop)

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        with self._explained(start, stop):
            super().read_into(start, stop, out)

    def read_uncached(self, start: int, stop: int, out: Rows) -> str | None:
        with self._explained(start, stop):
            return super().read_uncached(start, stop, out)

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        if self._extents is not None:
            yield from super().stored(start, stop)
        elif isinstance(self._store, LocalStore):
            rows = piece_shape(self._array)[0]
            for i in range(start // rows, -(-stop // rows)):
                if min((i + 1) * rows, self.shape[0]) <= stop:
                    for j in range(piece_grid(self._array)[1]):
                        file = RawFile(Path(self._store.root, piece_key(self._array, i, j)))
                        yield file.extent(0, file.size)

    def identity(self) -> object:
        return None if self._objects is None else {"objects": self._objects}

    def close(self) -> None:
        if self._extents is not None:
            self._extents.close()
        if isinstance(self._store, RemoteStore):
            self._store.close()

    def decode_into(self, start: int, stop: int, out: Rows) -> None:
        if self._index is not None:
            rows = piece_shape(self._array)[0]
            for i in range(start // rows, (stop - 1) // rows + 1):
                for j in range(self._sizes.shape[1]):
                    if not self._sizes[i, j] or self._changed(i, j):
                        self._sizes[i, j] = check_shard(self._array, self._index, self._store, i, j)
        # The buffer wraps ``out``: Zarr writes each decoded chunk into its place.
        (self._decoder or self._array).get_basic_selection(
            (slice(start, stop), slice(None)), out=NDBuffer.from_numpy_array(out), prototype=buffer_prototype
        )

    def _changed(self, i: int, j: int) -> bool:
        """Whether a shard is not as large as when it was checked; zarrs, which reads it itself, would not say."""
        if self._decoder is None or not isinstance(self._store, LocalStore):
            return False
        path = Path(self._store.root, piece_key(self._array, i, j))
        return not path.exists() or path.stat().st_size != self._sizes[i, j]

    @contextmanager
    def _explained(self, start: int, stop: int) -> Iterator[None]:
        """What goes wrong within, as a DataError that names the rows of the chunk at fault."""
        try:
            yield
        except MemoryError:
            raise
        # Codecs raise whatever they like (ValueError, RuntimeError, zlib.error, EOFError, …) on damaged bytes.
        except Exception as error:
            first, last, cause = self._narrow(start, stop, error)
            known = isinstance(cause, (DamagedStoreError, DataError))
            raise DataError(
                f"{self.name}: rows {first} to {last - 1} cannot be read: {reason_of(cause)}"
                + ("" if known else f" ({self._piece_of(first)}); restore it or write it again")
            ) from error

    def _piece_of(self, row: int) -> str:
        """The key of the first piece that holds ``row``."""
        return piece_key(self._array, row // piece_shape(self._array)[0], 0)

    def _narrow(self, start: int, stop: int, error: Exception) -> tuple[int, int, Exception]:
        """The stored chunk within rows [start, stop) that cannot be read, and why."""
        rows = int(self._array.chunks[0])
        for chunk in range(start // rows, -(-stop // rows)):
            first, last = max(start, chunk * rows), min(stop, (chunk + 1) * rows)
            try:
                super().read_into(first, last, np.empty((last - first, self.shape[1]), dtype=self.dtype))
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


def _open_path(path: str | os.PathLike[str], cache: Cache | None) -> tuple[str, StrictStore, ZarrArray]:
    """A folder or an address as (name, the store itself, the array seen through a strict view of it)."""
    name = os.fspath(path)
    try:
        if scheme_of(name):
            strict = StrictStore(RemoteStore(open_store(name), name, cache))
        else:
            Path(name).stat()
            strict = StrictStore(LocalStore(name, read_only=True))
        node = zarr.open(strict, mode="r")
    except FileNotFoundError as error:
        if scheme_of(name) or Path(name).exists():
            raise DataError(f"{name}: holds no zarr.json or .zarray; give the folder of a Zarr array") from error
        raise unreadable(name, error) from error
    except OSError as error:
        raise unreadable(name, error) from error
    except RequestError:
        raise
    # Damaged metadata surfaces as JSONDecodeError, KeyError, TypeError, …, whichever field is read first.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{name}: its Zarr metadata cannot be used ({reason}); restore zarr.json or .zarray") from error
    if isinstance(node, zarr.Group):
        raise group_refused(name, node)
    return name, strict, node


def _with_zarrs(array: ZarrArray, store: Store) -> ZarrArray | None:
    """The same array decoded by zarrs, which reads local folders itself; None where it is not installed or declines."""
    if not isinstance(store, LocalStore) or find_spec("zarrs") is None:
        return None
    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    try:
        # It warns of codecs that it does not know, and would go on with zarr-python's.
        with warnings.catch_warnings(action="error"), zarr.config.set(pipeline):
            local = LocalStore(store.root, read_only=True)
            return zarr.open_array(local, path=array.path, mode="r", zarr_format=array.metadata.zarr_format)
    except Exception:
        return None


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


def _transformation(name: str, array: ZarrArray, store: Store) -> Transformation | None:
    """What made the rows of a prepared array, which says so in its attributes.

    Raises
    ------
    DataError, DamagedFileError
        The file that holds it is missing, damaged, or another array's.
    """
    about = array.attrs.get("streamgmm")
    if not isinstance(about, dict) or "digest" not in about or not isinstance(store, (LocalStore, RemoteStore)):
        return None
    if isinstance(store, LocalStore):
        transformation = Transformation.load(Path(store.root, array.path, FILE))
    else:
        raw = sync(store.get(f"{array.path}/{FILE}" if array.path else FILE, buffer_prototype))
        if raw is None:
            raise DataError(f"{name}: lacks its {FILE}; restore it, or prepare the rows again")
        transformation = Transformation.parse(f"{name}/{FILE}", raw.to_bytes())
    if transformation.digest != about["digest"]:
        raise DataError(f"{name}: its {FILE} is another array's; restore it, or prepare the rows again")
    return transformation


def _check_chunks(name: str, array: ZarrArray) -> None:
    """Zarr takes a chunk of nothing in version 2."""
    if min(piece_shape(array)) < 1:
        raise DataError(f"{name}: its chunks are {array.chunks}, which hold no row; restore its metadata")


def _refuse_pickle(name: str, array: ZarrArray) -> None:
    """A version 2 array may name pickle as a codec, whose decoding runs code from the file."""
    codecs = [*(getattr(array.metadata, "filters", None) or ()), getattr(array.metadata, "compressor", None)]
    if any(getattr(codec, "codec_id", None) == "pickle" for codec in codecs):
        raise DataError(f"{name}: is encoded with pickle, which is never loaded; write it again without that filter")
