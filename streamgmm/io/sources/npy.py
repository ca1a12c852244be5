"""``.npy`` files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import STORED_DTYPES, Rows, check_shape
from streamgmm.io.sources.extents import ExtentSource, Placement
from streamgmm.io.sources.raw import RawFile, check_size

NPY: Any = npy_format  # which NumPy leaves untyped

HEADER_BYTES = 1 << 16
"""More than any header that NumPy itself agrees to parse; a longer one is an error, not an allocation."""

SCRATCH_BYTES = 1 << 22


class NpySource(ExtentSource):
    """Rows of an ``.npy`` file, shape (N, D).

    C order in a native type of `STORED_DTYPES` is read straight into place. Two opaque bytes a value (``V2``) are
    bfloat16, as ml_dtypes writes it. Fortran order, the other byte order and
    other real types are read piece by piece and converted (``read_path`` is then ``decode``): Fortran order takes one
    read a feature, so convert a large file once instead.

    Raises
    ------
    DataError
        Not an ``.npy`` file, damaged, truncated, too long, not two-dimensional, or not real numbers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = RawFile(path)
        self.name = self._file.path
        shape, self._fortran_order, self._stored, self._offset = self._read_header()
        self.dtype = stored_dtype(self.name, self._stored)
        self.shape = check_shape(self.name, shape)
        self._row_bytes = self.shape[1] * self._stored.itemsize
        check_size(self.name, self._file.size, self._offset + self.shape[0] * self._row_bytes)
        self.slow_because = self._conversion()
        if self.slow_because:
            self.read_path = "decode"

    def placements(self, start: int, stop: int) -> list[Placement]:
        row = self._row_bytes
        return [Placement(self._file, self._offset + start * row, (stop - start) * row, 0)]

    def decode_into(self, start: int, stop: int, out: Rows) -> None:
        if self._fortran_order:
            self._read_columns(start, stop, out)
        else:
            self._read_converted(start, stop, out)

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        if not self._fortran_order:
            yield from super().stored(start, stop)
            return
        item = self._stored.itemsize
        for feature in range(self.shape[1]):
            first = feature * self.shape[0] + start
            yield self._file.extent(self._offset + first * item, (stop - start) * item)

    @property
    def stored_bytes(self) -> int:
        return self.shape[0] * self._row_bytes

    def close(self) -> None:
        self._file.close()

    def _conversion(self) -> str:
        """What must be done to the stored values before they can be used; empty if nothing."""
        if self._fortran_order:
            return "it is in Fortran order, one read a feature"
        if not self._stored.isnative:
            return f"its values are big-endian ({self._stored.str})"
        return "" if self._stored in STORED_DTYPES else f"{self._stored} is converted to {self.dtype}"

    def _read_columns(self, start: int, stop: int, out: Rows) -> None:
        column: np.ndarray = np.empty(stop - start, dtype=self._stored)
        for feature in range(self.shape[1]):
            first = feature * self.shape[0] + start
            self._file.read_into(self._offset + first * self._stored.itemsize, column)
            np.copyto(out[:, feature], column, casting="unsafe")

    def _read_converted(self, start: int, stop: int, out: Rows) -> None:
        step = max(1, SCRATCH_BYTES // self._row_bytes)
        scratch: np.ndarray = np.empty((min(step, stop - start), self.shape[1]), dtype=self._stored)
        for first in range(start, stop, step):
            piece = scratch[: min(step, stop - first)]
            self._file.read_into(self._offset + first * self._row_bytes, piece)
            np.copyto(out[first - start : first - start + len(piece)], piece, casting="unsafe")

    def _read_header(self) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
        """(shape, Fortran order, stored type, offset of the data); the header is taken for hostile."""
        head: np.ndarray = np.empty(min(HEADER_BYTES, self._file.size), dtype=np.uint8)
        self._file.read_into(0, head)
        stream = BytesIO(head.tobytes())
        # NumPy evaluates the header as a Python literal: damage surfaces as SyntaxError, TokenError, RecursionError, …
        try:
            version = NPY.read_magic(stream)
            # Version 3 differs from 2 only in the encoding of field names, and structured types are refused anyway.
            read = NPY.read_array_header_1_0 if version == (1, 0) else NPY.read_array_header_2_0
            shape, fortran_order, dtype = read(stream)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"{self.name}: has no valid .npy header ({reason}); restore it or write it with numpy.save"
            ) from error
        return shape, fortran_order, dtype, stream.tell()
