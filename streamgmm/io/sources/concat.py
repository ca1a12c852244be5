"""Several sources, one after the other, as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import type_name
from streamgmm.io.plan import Extent
from streamgmm.io.sources.base import Recipe, Rows, Source


class ConcatSource(Source):
    """Sources in order: all rows of the first, then all rows of the second, and so on; shape (ΣN, D).

    ``read_granule`` is the largest of the parts', an upper bound: chunks of one part do not line up with the global
    row numbers, so `gather` asks each part itself.

    Raises
    ------
    DataError
        No parts, or parts that disagree in features or type; the message names both.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        if not sources:
            raise DataError("the list of data is empty; give at least one file or array")
        first = sources[0]
        for other in sources[1:]:
            if other.shape[1] != first.shape[1]:
                raise DataError(
                    f"{other.name}: has {other.shape[1]} features where {first.name} has {first.shape[1]}; "
                    "give parts with equally many features"
                )
            if other.dtype != first.dtype:
                raise DataError(
                    f"{other.name}: holds {type_name(other.dtype)} where {first.name} holds {type_name(first.dtype)}; "
                    "convert them to one type"
                )
            if _prepared(other) != _prepared(first):
                raise DataError(f"{other.name}: was prepared in another way than {first.name}; give parts of one kind")
        self.transformation = first.transformation
        self._parts = tuple(sources)
        self._starts = [0, *accumulate(part.shape[0] for part in sources)]
        self.name = first.name if len(sources) == 1 else f"{first.name} and {len(sources) - 1} more"
        self.shape = (self._starts[-1], first.shape[1])
        self.dtype = first.dtype
        self.read_granule = max(part.read_granule for part in sources)
        paths = {part.read_path for part in sources}
        self.read_path = next(path for path in ("decode", "objects", "extents", "memory") if path in paths)
        self.slow_because = next((part.slow_because for part in sources if part.slow_because), "")

    def recipe(self) -> Recipe:
        return self.opened_by or Recipe(_concatenated, tuple(part.recipe() for part in self._parts))

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        for part, offset, first, last in self._overlapping(start, stop):
            part.read_into(first - offset, last - offset, out[first - start : last - start])

    def read_uncached(self, start: int, stop: int, out: Rows) -> str | None:
        words = [
            part.read_uncached(first - offset, last - offset, out[first - start : last - start])
            for part, offset, first, last in self._overlapping(start, stop)
        ]
        return next((word for word in words if word), None)

    def stored(self, start: int, stop: int) -> Iterable[Extent]:
        for part, offset, first, last in self._overlapping(start, stop):
            yield from part.stored(first - offset, last - offset)

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self._parts)

    def files(self) -> Sequence[tuple[str, int, int]]:
        return [
            (name, offset + first, rows)
            for part, offset in zip(self._parts, self._starts, strict=False)
            for name, first, rows in part.files()
        ]

    def identity(self) -> object:
        identities = [part.identity() for part in self._parts]
        return None if all(identity is None for identity in identities) else identities

    def gather(self, indices: NDArray[np.int64]) -> tuple[Rows, int]:
        out = np.empty((len(indices), self.shape[1]), dtype=self.dtype)
        rows_read = 0
        edges = np.searchsorted(indices, self._starts)
        for part, offset, low, high in zip(self._parts, self._starts, edges[:-1], edges[1:], strict=False):
            if low < high:
                out[low:high], count = part.gather(indices[low:high] - offset)
                rows_read += count
        return out, rows_read

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[Source, int, int, int]]:
        """The parts that hold rows of [start, stop): each with its first global row, and the global rows wanted."""
        index = bisect_right(self._starts, start) - 1
        while index < len(self._parts) and self._starts[index] < stop:
            part, offset = self._parts[index], self._starts[index]
            yield part, offset, max(start, offset), min(stop, offset + part.shape[0])
            index += 1


def _concatenated(*parts: Recipe) -> ConcatSource:
    return ConcatSource([part.open() for part in parts])


def _prepared(source: Source) -> str:
    """What was done to its rows, as a digest; empty for raw ones."""
    return "" if source.transformation is None else source.transformation.digest
