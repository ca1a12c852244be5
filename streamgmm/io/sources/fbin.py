"""``.fbin``, ``.f16bin``, ``.u8bin`` and ``.i8bin``: two counts, then the rows as they are."""

from __future__ import annotations

import os

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.sources.base import check_shape
from streamgmm.io.sources.extents import ExtentSource, Placement
from streamgmm.io.sources.raw import RawFile, check_size, typed_by_suffix

DTYPES: dict[str, np.dtype[np.generic]] = {
    ".fbin": np.dtype(np.float32),
    ".f16bin": np.dtype(np.float16),
    ".u8bin": np.dtype(np.uint8),
    ".i8bin": np.dtype(np.int8),
}
"""The type of the values, by suffix."""

HEADER = np.dtype("<u4")
HEADER_BYTES = 8


class FbinSource(ExtentSource):
    """Rows of an ``.fbin``-family file, shape (N, D): ``<u4 n, <u4 d``, then n·d little-endian values.

    Raises
    ------
    DataError
        Another suffix, or a size other than 8 + n·d·itemsize.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.dtype = typed_by_suffix(path, DTYPES)
        self._file = RawFile(path)
        self.name = self._file.path
        if self._file.size < HEADER_BYTES:
            raise DataError(
                f"{self.name}: is truncated: its header needs {HEADER_BYTES} bytes, the file has {self._file.size}; "
                "restore it or write it again"
            )
        header: np.ndarray = np.empty(2, dtype=HEADER)
        self._file.read_into(0, header)
        self.shape = check_shape(self.name, header.tolist())
        self._row_bytes = self.shape[1] * self.dtype.itemsize
        check_size(self.name, self._file.size, HEADER_BYTES + self.shape[0] * self._row_bytes)

    def placements(self, start: int, stop: int) -> list[Placement]:
        row = self._row_bytes
        return [Placement(self._file, HEADER_BYTES + start * row, (stop - start) * row, 0)]

    def close(self) -> None:
        self._file.close()
