"""Reading all of the data for no other purpose than to see whether it is whole, and what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.integrity import UNIT_ROWS, fold, unit_checksums
from streamgmm.io.plan import Span, cut_spans, round_chunk_rows
from streamgmm.io.sources.base import Source
from streamgmm.parallel import map_in_order
from streamgmm.passes import Course, regions

_FULL_BATCH = Course()
_SPAN_BYTES = 8 << 20
_LEAF_BYTES = 64 << 10
"""Where any row can be read alone, damage is narrowed down to this."""


@dataclass(frozen=True)
class Damage:
    """Rows [first, last) that cannot be read, or are not what they were, and why."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class _Read:
    span: Span
    damages: tuple[Damage, ...]
    units: bytes


def verify(
    source: Source,
    known: Mapping[int, int],
    threads: int,
    seen: Callable[[int], object] = lambda rows: None,
    course: Course = _FULL_BATCH,
) -> Iterator[Damage]:
    """Every stretch of rows that is damaged, in order; reading goes on behind each.

    Whatever checksums the format has are compared by reading: a chunk of a Zarr array that cannot be decoded is one
    `Damage`, and so is one run of unreadable bytes of a plain file. Regions of ``course`` whose CRC-32C is in ``known``
    (by number) are compared with it where they could be read. ``seen`` hears of the rows read.
    """
    n, d = source.shape
    rows = max(_SPAN_BYTES // (d * source.dtype.itemsize), source.read_granule)
    parts = regions(course, n)
    whole_parts = (Span(first, last, place) for place, (first, last) in enumerate(parts))
    spans = cut_spans(whole_parts, round_chunk_rows(rows, UNIT_ROWS))
    checksum, whole = 0, True
    pending: Damage | None = None
    for read in map_in_order(lambda span: _read(source, span), spans, threads):
        for damage in read.damages:
            whole = False
            if pending is not None and _continues(pending, damage, source.read_granule):
                pending = replace(pending, last=damage.last)
                continue
            if pending is not None:
                yield pending
            pending = damage
        checksum = fold(checksum, read.units)
        seen(read.span.rows)
        first, last = parts[read.span.segment]
        if read.span.stop != last:
            continue
        if whole and known.get(read.span.segment, checksum) != checksum:
            if pending is not None:
                yield pending
            place = f"between {source.locate(first)} and {source.locate(last - 1)}"
            pending = Damage(first, last, f"{source.name}: changed {place} since the run's first pass; restore it")
        checksum, whole = 0, True
    if pending is not None:
        yield pending


def _continues(before: Damage, damage: Damage, granule: int) -> bool:
    """Whether both are one stretch of a file that has no chunks; chunks are listed one by one."""
    return granule == 1 and before.last == damage.first


def _read(source: Source, span: Span) -> _Read:
    out = np.empty((span.rows, source.shape[1]), dtype=source.dtype)
    damages = tuple(_damages(source, span.start, span.stop, out))
    return _Read(span, damages, b"" if damages else unit_checksums(out))


def _damages(source: Source, start: int, stop: int, out: np.ndarray) -> Iterator[Damage]:
    """What is wrong with rows [start, stop): halves of halves, cut where storage cuts."""
    try:
        source.read_uncached(start, stop, out)
    except DataError as error:
        granule = source.read_granule
        least = granule if granule > 1 else max(1, _LEAF_BYTES // (source.shape[1] * source.dtype.itemsize))
        # The granule boundary nearest the middle, where one lies between.
        middle = start + (stop - start) // 2
        cut = max(start - start % granule + granule, middle - middle % granule)
        if stop - start <= least or cut >= stop:
            yield Damage(start, stop, str(error))
            return
        yield from _damages(source, start, cut, out[: cut - start])
        yield from _damages(source, cut, stop, out[cut - start :])
