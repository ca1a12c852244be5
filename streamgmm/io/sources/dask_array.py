"""Dask arrays: rows that a task graph computes."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import opaque
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import Rows, Source, check_shape

if TYPE_CHECKING:
    import dask.array


class DaskSource(Source):
    """Rows of a two-dimensional Dask array, computed partition by partition whenever they are read.

    A slow path: every pass computes the graph again; write the array to Zarr first for more than a few passes. A
    partition (all features of one row chunk) is computed on the calling thread, one at a time, and the latest is kept,
    so a scan in small pieces computes each partition once and holds one in memory.

    Raises
    ------
    DataError
        Unknown chunk sizes, not two-dimensional, or not real numbers.
    """

    read_path = "decode"

    def __init__(self, array: dask.array.Array, name: str = "dask array") -> None:
        self.name = name
        if any(length != length for length in array.shape):  # NaN: unknown
            raise DataError(f"{name}: has unknown chunk sizes {array.shape}; call compute_chunk_sizes() on it first")
        self.shape = check_shape(name, array.shape)
        array = opaque(array)
        self.dtype = stored_dtype(name, array.dtype)
        rows = array.chunks[0]
        self.read_granule = int(max(rows))
        self._array = array
        self._starts = [0, *(int(stop) for stop in accumulate(rows))]
        self._lock = Lock()
        self._latest: tuple[int, np.ndarray] | None = None

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        row = start
        while row < stop:
            # bisect_right also steps over empty partitions.
            index = bisect_right(self._starts, row) - 1
            first, last = self._starts[index], min(self._starts[index + 1], stop)
            piece = self._partition(index)[row - first : last - first]
            np.copyto(out[row - start : last - start], piece, casting="unsafe")
            row = last

    def identity(self) -> object:
        """Dask's own token for the graph: equal graphs over equal inputs have equal names."""
        return str(self._array.name)

    def close(self) -> None:
        self._latest = None

    def _partition(self, index: int) -> np.ndarray:
        """Rows [starts[index], starts[index + 1]) as an array."""
        # Held while computing: other threads that wait for this partition must not compute it as well.
        with self._lock:
            if self._latest is None or self._latest[0] != index:
                self._latest = None  # before computing: never two partitions in memory
                self._latest = index, self._compute(index)
            return self._latest[1]

    def _compute(self, index: int) -> np.ndarray:
        start, stop = self._starts[index], self._starts[index + 1]
        # The graph runs whatever its author put in it, so any exception may come out.
        try:
            block = np.asarray(self._array[start:stop].compute(scheduler="synchronous"))
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(
                f"{self.name}: rows {start} to {stop - 1} cannot be computed ({reason}); check the graph's inputs"
            ) from error
        if block.shape != (stop - start, self.shape[1]):
            raise DataError(
                f"{self.name}: rows {start} to {stop - 1} were computed with shape {block.shape}, not "
                f"{(stop - start, self.shape[1])}; call compute_chunk_sizes() on it, or rebuild it with true chunks"
            )
        return block
