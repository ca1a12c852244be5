"""What a collection of rows must offer to be streamed."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DataError, RequestError
from streamgmm.io.bfloat16 import BFLOAT16, Rows, type_name
from streamgmm.io.plan import Extent, forget
from streamgmm.transforms import Transformation

__all__ = ["FINGERPRINT_ROWS", "STORED_DTYPES", "Rows", "Source", "check_shape"]

STORED_DTYPES = (*(np.dtype(name) for name in ("float64", "float32", "float16", "int8", "uint8")), BFLOAT16)
"""Types that cross to the device as they are stored; conversion happens there."""

FINGERPRINT_ROWS = 8

GATHER_GAP_BYTES = 32 << 10
"""Rows no further apart than this are gathered by one read,"""

GATHER_RUN_BYTES = 4 << 20
"""of at most this."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to open a source: what travels to other processes in its place, which then read the rows themselves."""

    opener: Callable[..., Source]
    arguments: tuple[Any, ...]

    def open(self) -> Source:
        """The source; raises as `open_source`."""
        return self.opener(*self.arguments)


class Source(ABC):
    """N rows of D features that can be read again and again, in any order, from several threads.

    Attributes
    ----------
    name : str
        What to call the data in a message: a path, or a description.
    shape : (int, int)
        (N, D); both at least 1.
    dtype : numpy.dtype
        One of `STORED_DTYPES`, in native byte order.
    read_granule : int
        Rows that storage reads at least at once (the rows of a compressed chunk); 1 where any row can be read alone.
    read_path : str
        How rows reach the caller: ``extents`` (bytes of a file read straight into place), ``objects`` (ranges of
        objects in a store, likewise), ``decode`` (through a codec, a conversion or a task graph) or ``memory`` (copied
        from an array).
    slow_because : str
        Why rows are decoded, in a few words; empty where they are not.
    transformation : Transformation or None
        What was done to raw vectors to make these rows; None where that is not known, or they are raw.
    opened_by : Recipe or None
        How another process opens the same rows; None where only this one has them.
    """

    name: str
    shape: tuple[int, int]
    dtype: np.dtype[np.generic]
    read_granule: int = 1
    read_path: str = "memory"
    slow_because: str = ""
    transformation: Transformation | None = None
    opened_by: Recipe | None = None

    def recipe(self) -> Recipe:
        """How another process opens it.

        Raises
        ------
        RequestError
            It cannot.
        """
        if self.opened_by is None:
            raise RequestError(
                f"{self.name}: is in the memory of this process, where no other can read it; save it and give its path"
            )
        return self.opened_by

    @abstractmethod
    def read_into(self, start: int, stop: int, out: Rows) -> None:
        """Read rows [start, stop) into ``out``, shape (stop − start, D), of ``dtype``, C-contiguous.

        Safe to call from several threads at once.

        Raises
        ------
        DataError
            The storage is truncated, damaged or unreadable; the message names the file and the place.
        """

    def read_uncached(self, start: int, stop: int, out: Rows) -> str | None:
        """As `read_into`, and leaves in the page cache nothing of what it read.

        Gives, in a line, the reason where the storage had to be read through the page cache after all.
        """
        self.read_into(start, stop, out)
        for extent in self.stored(start, stop):
            forget(extent)
        return None

    def stored(self, start: int, stop: int) -> Iterable[Extent]:
        """The bytes of files that rows [start, stop) are made from, in order; none where no file is known.

        What several calls share (a compressed shard) belongs to the call that reads its last row.
        """
        return ()

    @property
    def stored_bytes(self) -> int:
        """Bytes of files that a pass over the rows reads; 0 where no file is known."""
        return sum(extent.length for extent in self.stored(0, self.shape[0]))

    def view(self, start: int, stop: int) -> Rows | None:
        """Rows [start, stop) where they already lie in memory as `read_into` would leave them, or None.

        Writable and C-contiguous; they stay as they are while the source is open.
        """
        return None

    def files(self) -> Sequence[tuple[str, int, int]]:
        """The parts the rows come from: (name, first row, rows). In-memory data is one part."""
        return [(self.name, 0, self.shape[0])]

    def identity(self) -> object:
        """What, besides shape, dtype and contents, tells this data from other data (JSON values, e.g. file sizes)."""
        return None

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Release files; the source is not used afterwards."""

    def read(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) as a new array."""
        out = np.empty((stop - start, self.shape[1]), dtype=self.dtype)
        self.read_into(start, stop, out)
        return out

    def chunks(self, rows: int) -> Iterator[Rows]:
        """All rows in order, ``rows`` at a time (the last piece may be shorter)."""
        for start in range(0, self.shape[0], rows):
            yield self.read(start, min(start + rows, self.shape[0]))

    def gather(self, indices: NDArray[np.int64]) -> tuple[Rows, int]:
        """The rows at sorted, distinct ``indices``, and how many rows storage had to read for them."""
        out = np.empty((len(indices), self.shape[1]), dtype=self.dtype)
        rows_read, position, granule = 0, 0, self.read_granule
        for run in np.split(indices, _breaks(indices, granule, out.itemsize * self.shape[1])) if len(indices) else []:
            start, stop = int(run[0]), int(run[-1]) + 1
            out[position : position + len(run)] = self.read(start, stop)[run - start]
            position += len(run)
            first = start - start % granule
            rows_read += stop - start if granule == 1 else min(first + granule, self.shape[0]) - first
        return out, rows_read

    def locate(self, row: int) -> str:
        """Where global ``row`` lies, for a message: ``row 5 of b.npy``."""
        for name, first, rows in self.files():
            if first <= row < first + rows:
                return f"row {row - first} of {name}"
        raise IndexError(row)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, dtype, the parts' sizes and a few rows spread over the data.

        Equal data gives equal fingerprints wherever it lies; in an object store, its objects' versions count too.
        """
        n = self.shape[0]
        spread = np.unique(np.linspace(0, n - 1, FINGERPRINT_ROWS).astype(np.int64))
        facts = {
            "shape": self.shape,
            "dtype": type_name(self.dtype),
            "parts": [rows for _, _, rows in self.files()],
            "identity": self.identity(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(self.gather(spread)[0].tobytes())
        return digest.hexdigest()


def _breaks(indices: NDArray[np.int64], granule: int, row_bytes: int) -> NDArray[np.int64]:
    """Where sorted ``indices`` are cut into runs that are read together: rows of one chunk, or near neighbours."""
    if granule > 1:
        group = indices // granule
    else:
        # What lies between two rows is read faster than it is skipped, up to a point.
        far = np.diff(indices, prepend=indices[:1]) * row_bytes > GATHER_GAP_BYTES
        group = np.cumsum(far) + indices // max(1, GATHER_RUN_BYTES // row_bytes)
    return np.flatnonzero(np.diff(group)) + 1


def check_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """``shape`` as (N, D), both at least 1.

    Raises
    ------
    DataError
        Another rank, or no rows, or no features.
    """
    if len(shape) != 2:
        raise DataError(f"{name}: must be two-dimensional (rows, features); its shape is {tuple(shape)}")
    n, d = (int(length) for length in shape)
    if n < 1 or d < 1:
        raise DataError(f"{name}: holds no data (shape {(n, d)}); give at least one row and one feature")
    return n, d
