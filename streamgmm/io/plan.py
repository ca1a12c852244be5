"""Which rows move at once, and which bytes of which file they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
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
    return cut_spans(segment_spans(n_samples, start), chunk_rows)


def segment_spans(n_samples: int, start: int = 0) -> list[Span]:
    """Rows [start, n_samples) as one span a segment that has any."""
    bounds = enumerate(segment_bounds(n_samples))
    return [Span(max(first, start), last, segment) for segment, (first, last) in bounds if max(first, start) < last]


def cut_spans(spans: Iterable[Span], chunk_rows: int) -> list[Span]:
    """Cut each span into chunks of at most ``chunk_rows``, which divides a block or is a multiple of one."""
    if BLOCK_ROWS % chunk_rows and chunk_rows % BLOCK_ROWS:
        raise ValueError(f"chunk_rows must divide {BLOCK_ROWS} or be a multiple of it; got {chunk_rows}")
    return [
        Span(row, min(row + chunk_rows, span.stop), span.segment)
        for span in spans
        for row in range(span.start, span.stop, chunk_rows)
    ]


def round_chunk_rows(rows: int, granule: int) -> int:
    """The largest permitted chunk of at most ``rows``, and at least one ``granule`` (a power of two)."""
    if rows >= BLOCK_ROWS:
        return rows // BLOCK_ROWS * BLOCK_ROWS
    return max(granule, 1 << (max(rows, 1).bit_length() - 1))


@dataclass(frozen=True)
class Extent:
    """Bytes of a file that are rows as they are: they can be read straight into place.

    ``owner`` is what keeps the descriptor open; it is held as long as the extent is.
    """

    path: str
    descriptor: int
    offset: int
    length: int
    owner: object = None


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
            raise read_failed(extent, done, error) from error
        if count == 0:
            raise ended_early(extent, done)
        done += count


def forget(extent: Extent) -> None:
    """Drop the extent's pages from the page cache; a descriptor that takes no advice is left alone."""
    with suppress(OSError):
        os.posix_fadvise(extent.descriptor, extent.offset, extent.length, os.POSIX_FADV_DONTNEED)


def read_failed(extent: Extent, done: int, error: OSError) -> DataError:
    """The one-line error for a read that failed after ``done`` bytes."""
    place = f"{extent.path}: read failed at byte {extent.offset + done} ({error.strerror})"
    return DataError(f"{place}; check the device")


def ended_early(extent: Extent, done: int) -> DataError:
    """The one-line error for a file that ended after ``done`` bytes."""
    return DataError(
        f"{extent.path}: ends at byte {extent.offset + done}, {extent.length - done} bytes too early; "
        "the file is truncated, restore it"
    )
