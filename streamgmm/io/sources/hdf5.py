"""Datasets in HDF5 files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock

import h5py
import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import STORED_DTYPES, Rows, check_shape
from streamgmm.io.sources.extents import ExtentSource, Placement
from streamgmm.io.sources.raw import RawFile
from streamgmm.io.wording import listed, reason_of

LOCK = Lock()
"""HDF5 lets one thread in at a time; waiting here keeps others from waiting inside it."""


class Hdf5Source(ExtentSource):
    """Rows of a two-dimensional dataset, shape (N, D).

    A contiguous dataset in a native type is one run of bytes of the file, read straight into place; the library is not
    asked again. Chunked or converted ones are decoded by it: a slow path, one thread at a time.

    Only the file itself is read: external links, external storage and virtual datasets name other files, and are
    refused. So are datasets with chunks that were never written, which HDF5 reads as fill values.

    Parameters
    ----------
    path : path
    dataset : str, optional
        Its name within the file; may be left out where there is exactly one two-dimensional dataset of numbers.

    Raises
    ------
    DataError
        No HDF5 file, no such dataset, another rank, not real numbers, parts never written, or data in other files.
    """

    def __init__(self, path: str | os.PathLike[str], dataset: str | None = None) -> None:
        self._file = RawFile(path)
        try:
            self._library = h5py.File(self._file.path, "r", locking="best-effort")
        except OSError as error:
            raise DataError(f"{self._file.path}: is no readable HDF5 file ({reason_of(error)}); restore it") from error
        try:
            self._open(dataset)
        except DataError:
            self._library.close()
            raise
        # h5py raises whichever of KeyError, RuntimeError, OSError, … the damaged part calls for.
        except Exception as error:
            self._library.close()
            raise DataError(f"{self._file.path}: cannot be used ({reason_of(error)}); restore it") from error

    def _open(self, dataset: str | None) -> None:
        where = _only_dataset(self._file.path, self._library) if dataset is None else dataset
        found = _inside(self._file.path, self._library, where)
        self.name = f"{self._file.path}::{where.strip('/')}"
        _check_storage(self.name, found)
        stored = np.dtype(found.dtype)
        self.dtype = stored_dtype(self.name, stored)
        self.shape = check_shape(self.name, found.shape)
        self._dataset, self._stored, self._dataset_chunks = found, stored, found.chunks
        self._offset = found.id.get_offset()
        if found.chunks is not None:
            filters = found.compression or ("chunks" if not found.id.get_create_plist().get_nfilters() else "filters")
            self.slow_because = f"its chunks are read by HDF5 ({filters})"
            self.read_granule = int(found.chunks[0])
        elif self._offset is None:
            self.slow_because = "it is stored compactly, in its header"
        elif not stored.isnative or stored not in STORED_DTYPES:
            self.slow_because = f"{stored.str} is converted to {self.dtype.name}"
        if self.slow_because:
            self.read_path = "decode"
            return
        needed = self._offset + self.stored_bytes
        if self._file.size < needed:
            raise DataError(
                f"{self.name}: is truncated: it reaches to byte {needed}, the file has {self._file.size}; restore it"
            )
        self._library.close()

    def placements(self, start: int, stop: int) -> list[Placement]:
        row_bytes = self.shape[1] * self.dtype.itemsize
        return [Placement(self._file, self._offset + start * row_bytes, (stop - start) * row_bytes, 0)]

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        if self._dataset_chunks is not None:
            yield from self._stored_chunks(start, stop, *self._dataset_chunks)
        elif self._offset is not None:
            row_bytes = self.shape[1] * self._stored.itemsize
            yield self._file.extent(self._offset + start * row_bytes, (stop - start) * row_bytes)

    def _stored_chunks(self, start: int, stop: int, rows: int, features: int) -> Iterator[Extent]:
        for row in range(start // rows * rows, stop, rows):
            # A chunk belongs to who reads its last row.
            if start < min(row + rows, self.shape[0]) <= stop:
                for feature in range(0, self.shape[1], features):
                    with LOCK:
                        chunk = self._dataset.id.get_chunk_info_by_coord((row, feature))
                    yield self._file.extent(chunk.byte_offset, chunk.size)

    def close(self) -> None:
        with suppress(Exception):
            self._library.close()
        self._file.close()

    def decode_into(self, start: int, stop: int, out: Rows) -> None:
        try:
            with LOCK:
                if self._dataset.dtype == self.dtype:
                    self._dataset.read_direct(out, np.s_[start:stop])
                else:
                    np.copyto(out, self._dataset[start:stop], casting="unsafe")
        except MemoryError:
            raise
        except Exception as error:
            place = f"{self.name}: rows {start} to {stop - 1} cannot be read"
            raise DataError(f"{place}: {reason_of(error)}; restore it or write it again") from error


def _only_dataset(path: str, library: h5py.File) -> str:
    """The one two-dimensional dataset of numbers in the file; links to elsewhere are not followed."""
    found: list[str] = []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 2 and item.dtype.kind in "iufb":
            found.append(name)

    library.visititems(note)
    if len(found) != 1:
        told = f"holds {len(found)} two-dimensional datasets" + (f", {listed(found)}" if found else "")
        raise DataError(f"{path}: {told}; name one, as {path}::{found[0] if found else 'DATASET'}")
    return found[0]


def _inside(path: str, library: h5py.File, where: str) -> h5py.Dataset:
    """The dataset at ``where``, with no step out of the file."""
    node: h5py.Group | h5py.Dataset = library
    for step in [step for step in where.split("/") if step not in ("", ".")]:
        link = node.get(step, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise DataError(f"{path}: holds no dataset {where!r}; its members: {listed(sorted(library.keys()))}")
        if not isinstance(link, h5py.HardLink):
            raise DataError(f"{path}: {where!r} is a link, possibly to another file; name the dataset itself")
        node = node[step]
    if not isinstance(node, h5py.Dataset):
        members = listed([f"{where.strip('/')}/{name}" for name in node])
        raise DataError(f"{path}: {where!r} is a group, not a dataset; its members: {members}")
    return node


def _check_storage(name: str, dataset: h5py.Dataset) -> None:
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{name}: its values lie in other files; copy them into one dataset")
    if dataset.ndim != 2 or not dataset.size:
        return
    if dataset.chunks is not None:
        rows, features = dataset.chunks
        expected = -(-dataset.shape[0] // rows) * -(-dataset.shape[1] // features)
        written = dataset.id.get_num_chunks()
        if written < expected:
            raise DataError(
                f"{name}: {expected - written} of its {expected} chunks were never written, and HDF5 would read fill "
                "values; write them"
            )
    elif dataset.id.get_storage_size() == 0:
        raise DataError(f"{name}: was never written, and HDF5 would read fill values; write it")
