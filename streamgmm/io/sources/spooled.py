"""Rows of an iterator, kept in a temporary file so that they can be read again and again."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable
from typing import IO, Any

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import BFLOAT16, type_name
from streamgmm.io.plan import Extent, read_extent
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Rows, Source, check_shape

_PIECE_BYTES = 4 << 20


class SpooledSource(Source):
    """The rows of ``items``, in order, in an unnamed file: private, and gone when it is closed or the process ends.

    The iterator is read once, here; memory holds one item and a few megabytes. The file lies in ``folder``, or where
    ``TMPDIR`` says, and takes as many bytes as the rows.

    Parameters
    ----------
    items : iterable
        Each a two-dimensional array, or anything else that `open_source` takes; items without rows are passed over.
    folder : path, optional

    Raises
    ------
    DataError
        An item cannot be read, differs in its number of features from the first or has a wider type; there is no row
        at all; or the folder is full or not writable. The message counts items from 0.
    """

    read_path = "extents"

    def __init__(self, items: Iterable[Any], folder: str | os.PathLike[str] | None = None) -> None:
        self.name = "iterator"
        self._folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as the source
        except OSError as error:
            raise self._no_room(error) from error
        self._finalizer = weakref.finalize(self, self._file.close)
        self._rows = 0
        try:
            for index, item in enumerate(items):
                self._append(index, item)
            self._flush()
        except BaseException:
            self.close()
            raise
        if not self._rows:
            self.close()
            raise DataError("iterator: gave no rows; give at least one array with rows (an iterator can be read once)")
        self._descriptor = self._file.fileno()

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        row_bytes = self.shape[1] * self.dtype.itemsize
        extent = Extent(self.name, self._descriptor, start * row_bytes, (stop - start) * row_bytes)
        read_extent(extent, out.reshape(-1).view(np.uint8))

    def close(self) -> None:
        self._descriptor = -1
        self._finalizer()

    def _append(self, index: int, item: Any) -> None:
        shape: tuple[int, ...] = tuple(getattr(item, "shape", ()))
        if len(shape) == 2 and shape[0] == 0:
            return
        try:
            source = open_source(item)
        except DataError as error:
            raise DataError(f"item {index} of the iterator: {error}") from error
        if self._rows == 0:
            self.dtype, n_features = source.dtype, source.shape[1]
        else:
            n_features = self.shape[1]
        if source.shape[1] != n_features:
            raise DataError(
                f"item {index} of the iterator: has {source.shape[1]} features and those before it {n_features}; "
                "give arrays of one width"
            )
        if not _fits(source.dtype, self.dtype):
            raise DataError(
                f"item {index} of the iterator: holds {type_name(source.dtype)}, which does not fit in the "
                f"{type_name(self.dtype)} of the first; convert them to one type"
            )
        rows = max(1, _PIECE_BYTES // (n_features * self.dtype.itemsize))
        for piece in source.chunks(rows):
            try:
                self._file.write(np.ascontiguousarray(piece, dtype=self.dtype).reshape(-1).view(np.uint8).data)
            except OSError as error:
                raise self._no_room(error) from error
        if source is not item:
            source.close()
        self._rows += source.shape[0]
        self.shape = check_shape(self.name, (self._rows, n_features))

    def _flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> DataError:
        return DataError(
            f"{self._folder}: the iterator's rows cannot be kept there ({error.strerror}); "
            "free some space, or name another folder in TMPDIR"
        )


def _fits(dtype: np.dtype[np.generic], other: np.dtype[np.generic]) -> bool:
    """Whether every value of ``dtype`` is one of ``other``; NumPy takes bfloat16 for opaque bytes."""
    return dtype == other or (BFLOAT16 not in (dtype, other) and np.can_cast(dtype, other, "safe"))
