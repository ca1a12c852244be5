"""``.fvecs`` and ``.bvecs``: every row behind a count of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.base import Rows, Source, check_shape
from streamgmm.io.sources.raw import RawFile, typed_by_suffix

DTYPES: dict[str, np.dtype[np.generic]] = {".fvecs": np.dtype(np.float32), ".bvecs": np.dtype(np.uint8)}
"""The type of the values, by suffix."""

COUNT = np.dtype("<i4")

MAX_FEATURES = 1 << 24
"""A larger count is damage, not a dimension."""

SCRATCH_BYTES = 1 << 20
"""Records read at once, to be stripped of their counts while a cache holds them."""


ReadFile: TypeAlias = Callable[[RawFile, int, np.ndarray], str | None]


class VecsSource(Source):
    """Rows of an ``.fvecs`` or ``.bvecs`` file, shape (N, D): ``<i4 D`` and D little-endian values, N times.

    The bytes of a row lie in the file as they are, but never two rows side by side, so they pass through a scratch of
    `SCRATCH_BYTES`. Every count is compared with the first one as it is read.

    Raises
    ------
    DataError
        Another suffix, a first count that cannot be one, or a size that is no whole number of rows.
    """

    read_path = "extents"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.dtype = typed_by_suffix(path, DTYPES)
        self._file = RawFile(path)
        self.name = self._file.path
        if self._file.size < COUNT.itemsize:
            raise DataError(f"{self.name}: is truncated: no row fits in {self._file.size} bytes; restore it")
        count: np.ndarray = np.empty(1, dtype=COUNT)
        self._file.read_into(0, count)
        features = int(count[0])
        if not 1 <= features <= MAX_FEATURES:
            raise DataError(f"{self.name}: its first row has {features} features by its count; restore it")
        self._record = np.dtype([("count", COUNT), ("values", self.dtype, (features,))])
        rows, rest = divmod(self._file.size, self._record.itemsize)
        if rest:
            raise DataError(
                f"{self.name}: is truncated or no {Path(path).suffix.lower()} file: "
                f"{self._file.size} bytes are not a whole number of "
                f"rows of {features} features, {self._record.itemsize} bytes each; restore it or write it again"
            )
        self.shape = check_shape(self.name, (rows, features))

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        self._strip(start, stop, out, RawFile.read_into)

    def read_uncached(self, start: int, stop: int, out: Rows) -> str | None:
        return self._strip(start, stop, out, RawFile.read_uncached)

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        size = self._record.itemsize
        yield self._file.extent(start * size, (stop - start) * size)

    def close(self) -> None:
        self._file.close()

    def _strip(
        self, start: int, stop: int, out: Rows, read: Callable[[RawFile, int, np.ndarray], str | None]
    ) -> str | None:
        size, features, word = self._record.itemsize, self.shape[1], None
        step = max(1, SCRATCH_BYTES // size)
        scratch: np.ndarray = np.empty(min(step, stop - start), dtype=self._record)
        for first in range(start, stop, step):
            records = scratch[: min(step, stop - first)]
            told = read(self._file, first * size, records)
            word = word or told
            wrong = records["count"] != features
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"{self.name}: row {first + row} at byte {(first + row) * size} has {records['count'][row]} "
                    f"features by its count where the first has {features}; it is damaged, restore it"
                )
            out[first - start : first - start + len(records)] = records["values"]
        return word
