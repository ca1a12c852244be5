"""Which rows move at once, and which bytes of which file they are."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from streamgmm.errors import DataError
from streamgmm.statistics import BLOCK_ROWS, segment_bounds


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one segment: what one chunk holds."""

    start: int
    stop: int
    segment: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def plan_chunks(n_samples: int, chunk_rows: int, start: int = 0) -> list[Span]:
    """Cut rows [start, n_samples) into chunks of at most ``chunk_rows``, none across a segment.

    ``chunk_rows`` divides a block or is a multiple of one, so chunks meet block boundaries exactly; ``start`` must be
    the end of a chunk of some such plan.
    """
    if BLOCK_ROWS % chunk_rows and chunk_rows % BLOCK_ROWS:
        raise ValueError(f"chunk_rows must divide {BLOCK_ROWS} or be a multiple of it; got {chunk_rows}")
    return [
        Span(row, min(row + chunk_rows, last), segment)
        for segment, (first, last) in enumerate(segment_bounds(n_samples))
        for row in range(max(first, start), last, chunk_rows)
    ]


def round_chunk_rows(rows: int, granule: int) -> int:
    """The largest permitted chunk of at most ``rows``, and at least one ``granule`` (a power of two)."""
    if rows >= BLOCK_ROWS:
        return rows // BLOCK_ROWS * BLOCK_ROWS
    return max(granule, 1 << (max(rows, 1).bit_length() - 1))


@dataclass(frozen=True)
class Extent:
    """Bytes of a file that are rows as they are: they can be read straight into place."""

    path: str
    descriptor: int
    offset: int
    length: int


def read_extent(extent: Extent, out: np.ndarray) -> None:
    """Fill ``out`` (uint8, ``extent.length``) from the file; short reads are continued.

    Raises
    ------
    DataError
        The file ends early or cannot be read; the message names file and offset.
    """
    view, done = out.data, 0
    while done < extent.length:
        try:
            count = os.preadv(extent.descriptor, [view[done:]], extent.offset + done)
        except OSError as error:
            place = f"{extent.path}: read failed at byte {extent.offset + done} ({error.strerror})"
            raise DataError(f"{place}; check the device") from error
        if count == 0:
            raise DataError(
                f"{extent.path}: ends at byte {extent.offset + done}, {extent.length - done} bytes too early; "
                "the file is truncated, restore it"
            )
        done += count
