"""What this machine reaches on each part of the data's way: each measured alone, for a second or so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from math import inf
from threading import Lock

import numpy as np
import torch

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent, Span, plan_chunks, read_extent, round_chunk_rows
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.raw import RawFile

PIECE_BYTES = 8 << 20
"""Bytes that a thread reads at once."""

SAMPLE_BYTES = 256 << 20
"""Bytes that are read again and again where the page cache is measured."""

_CHUNK_BYTES = 16 << 20


def storage_rate(extents: Sequence[Extent], threads: int, seconds: float) -> float | None:
    """Bytes a second of ``O_DIRECT`` reads of ``extents``; None where the file system refuses them."""
    refused = False

    def read(extent: Extent, out: np.ndarray) -> None:
        nonlocal refused
        file = extent.owner
        assert isinstance(file, RawFile)
        refused = file.read_uncached(extent.offset, out) is not None or refused

    rate = _rate(extents, read, threads, seconds, repeat=False)
    return None if refused else rate


def cache_rate(
    extents: Sequence[Extent], threads: int, seconds: float, limit: int = SAMPLE_BYTES, into: int = PIECE_BYTES
) -> float:
    """Bytes a second of ``preadv`` of the first ``limit`` bytes of extents, brought to the page cache before.

    Each thread fills the same ``into`` bytes again and again: few stay in the processor's cache, and what is written
    there need not reach memory.
    """
    some = list(_first_bytes(extents, limit))
    _rate(some, read_extent, threads, inf, repeat=False)
    return _rate(some, read_extent, threads, seconds, repeat=True, into=into)


def copy_rate(seconds: float) -> float:
    """Bytes a second of one thread that copies memory which no cache holds."""
    source: np.ndarray = np.ones(SAMPLE_BYTES // 2, np.uint8)
    target = np.zeros_like(source)
    return _repeated(lambda: np.copyto(target, source), source.nbytes, seconds)


def source_rate(source: Source, threads: int, seconds: float) -> float:
    """Bytes of rows a second that reach host memory, decoding included, from the page cache.

    Raises
    ------
    DataError
        The rows cannot be read.
    """
    row_bytes = source.shape[1] * source.dtype.itemsize
    rows = round_chunk_rows(max(_CHUNK_BYTES // row_bytes, source.read_granule), 1)
    spans = [span for span in plan_chunks(source.shape[0], rows) if span.start * row_bytes < SAMPLE_BYTES]
    with Ring(source, rows, torch.device("cpu"), threads) as ring:
        done = _stream_rate(ring, spans, row_bytes, seconds)[1]
        rate, _ = _stream_rate(ring, spans[:done], row_bytes, seconds)
    return rate


def pinned_rate(device: torch.device, seconds: float) -> float:
    """Bytes a second copied from pinned memory to a CUDA device."""
    source = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return _repeated(copy, source.nbytes, seconds)


def sample_extents(source: Source, limit: int = 4 << 30) -> list[Extent]:
    """Extents of about the first ``limit`` bytes of the source's files; none for data in memory."""
    n = source.shape[0]
    share = max(1, min(n, limit // max(1, source.shape[1] * source.dtype.itemsize)))
    some = list(_first_bytes(source.stored(0, share), limit))
    # A granule shared by many rows belongs to its last row: the share may end before it.
    return some or list(_first_bytes(source.stored(0, n), limit))


def _stream_rate(ring: Ring, spans: list[Span], row_bytes: int, seconds: float) -> tuple[float, int]:
    """Bytes a second through a ring, and how many spans there was time for."""
    begun, rows, done = time.perf_counter(), 0, 0
    stream = ring.stream(spans)
    for chunk in stream:
        rows += chunk.span.rows
        done += 1
        if time.perf_counter() - begun > seconds:
            break
    elapsed = time.perf_counter() - begun
    stream.close()
    return rows * row_bytes / elapsed, done


def _rate(
    extents: Sequence[Extent],
    read: Callable[[Extent, np.ndarray], None],
    threads: int,
    seconds: float,
    *,
    repeat: bool,
    into: int = PIECE_BYTES,
) -> float:
    """Bytes a second that ``threads`` read of ``extents`` in pieces, until those or the seconds are spent."""
    pieces, lock = _pieces(extents, repeat=repeat), Lock()
    begun = time.perf_counter()

    def work() -> int:
        places = cycle(np.empty((into // PIECE_BYTES, PIECE_BYTES), np.uint8))
        total = 0
        # At least one piece: on a busy machine the time may be over before a thread has begun.
        while not total or time.perf_counter() - begun < seconds:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                break
            read(piece, next(places)[: piece.length])
            total += piece.length
        return total

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(lambda _: work(), range(threads)))
    elapsed = time.perf_counter() - begun
    if not total:
        raise DataError("there is nothing to read; give a data set that lies in files")
    return total / elapsed


def _pieces(extents: Sequence[Extent], *, repeat: bool) -> Iterator[Extent]:
    while True:
        for extent in extents:
            for done in range(0, extent.length, PIECE_BYTES):
                length = min(PIECE_BYTES, extent.length - done)
                yield Extent(extent.path, extent.descriptor, extent.offset + done, length, extent.owner)
        if not repeat:
            return


def _first_bytes(extents: Iterable[Extent], limit: int) -> Iterator[Extent]:
    left = limit
    for extent in extents:
        length = min(extent.length, left)
        if length > 0:
            yield Extent(extent.path, extent.descriptor, extent.offset, length, extent.owner)
        left -= length
        if left <= 0:
            return


def _repeated(work: Callable[[], object], size: int, seconds: float) -> float:
    """Bytes a second of ``work``, which moves ``size`` bytes, done once before."""
    work()
    begun, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - begun < seconds:
        work()
        times += 1
    return size * times / (time.perf_counter() - begun)
