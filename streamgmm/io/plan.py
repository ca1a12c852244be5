"""Which rows move at once, and which bytes of which file they are."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from streamgmm.errors import DataError
from streamgmm.statistics import BLOCK_ROWS, segment_bounds


@dataclass(frozen=True)
class Span:
    """Rows [start, stop): what one chunk holds. ``segment`` is that of the first row."""

    start: int
    stop: int
    segment: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def plan_chunks(n_samples: int, chunk_rows: int, start: int = 0, most: int = 1) -> list[Span]:
    """Cut rows [start, n_samples) into chunks of at most ``chunk_rows``, each of a segment or of ``most`` whole ones.

    ``chunk_rows`` divides a block or is a multiple of one, so chunks meet block boundaries exactly; ``start`` must be
    the end of a chunk of some such plan.
    """
    return cut_spans(segment_spans(n_samples, start), chunk_rows, most)


def segment_spans(n_samples: int, start: int = 0) -> list[Span]:
    """Rows [start, n_samples) as one span a segment that has any."""
    bounds = enumerate(segment_bounds(n_samples))
    return [Span(max(first, start), last, segment) for segment, (first, last) in bounds if max(first, start) < last]


def cut_spans(spans: Iterable[Span], chunk_rows: int, most: int = 1) -> list[Span]:
    """Cut each span into chunks of at most ``chunk_rows``, which divides a block or is a multiple of one.

    Up to ``most`` spans that follow one another share a chunk where they fit one.
    """
    if BLOCK_ROWS % chunk_rows and chunk_rows % BLOCK_ROWS:
        raise ValueError(f"chunk_rows must divide {BLOCK_ROWS} or be a multiple of it; got {chunk_rows}")
    chunks, shared = list[Span](), most
    for span in spans:
        last = chunks[-1] if shared < most else None
        if last is not None and last.stop == span.start and span.stop - last.start <= chunk_rows:
            chunks[-1], shared = replace(last, stop=span.stop), shared + 1
        else:
            rows = range(span.start, span.stop, chunk_rows)
            chunks += [Span(row, min(row + chunk_rows, span.stop), span.segment) for row in rows]
            shared = 1 if len(rows) == 1 else most
    return chunks


def chunks_left(chunks: Iterable[Span], left: Sequence[Span]) -> list[Span]:
    """What remains of ``chunks`` where only the rows of ``left`` do; both are in the order of the rows.

    Chunks keep their ends: what stays in memory between passes is found by them.
    """
    parts = list[Span]()
    for chunk in chunks:
        own = parts_of(chunk, left)
        for part in own:
            if part is not own[0] and parts[-1].stop == part.start:
                parts[-1] = replace(parts[-1], stop=part.stop)
            else:
                parts.append(part)
    return parts


def parts_of(chunk: Span, spans: Sequence[Span]) -> list[Span]:
    """The rows of a chunk by the spans, in the order of the rows, that they belong to."""
    first = bisect_right(spans, chunk.start, key=lambda span: span.stop)
    last = bisect_left(spans, chunk.stop, key=lambda span: span.start)
    return [Span(max(s.start, chunk.start), min(s.stop, chunk.stop), s.segment) for s in spans[first:last]]


def cut_at_granules(start: int, stop: int, rows: int, granule: int) -> list[tuple[int, int]]:
    """Rows [start, stop) in pieces (first, end) of at most ``rows``, a multiple of the ``granule`` that they end at."""
    cuts = range(start - start % granule, stop, rows)
    return list(pairwise([*(max(cut, start) for cut in cuts), stop]))


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
