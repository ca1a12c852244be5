"""Spans of a source, read in pieces by threads, and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from streamgmm.io.plan import Span, cut_at_granules
from streamgmm.io.readers import Readers, Result
from streamgmm.io.sending import Sender, Sending
from streamgmm.io.sources.base import Rows, Source
from streamgmm.io.traffic import Traffic

_PIECE_BYTES = 8 << 20
"""Smaller pieces wait for each other: a thread's turn costs as much as reading a part of this from the page cache."""

_MOST_SENDERS = 10
"""More threads that send rows on hold up each other, and the consumer."""


class SpanReader:
    """Reads spans of a source.

    Parameters
    ----------
    source : Source
    threads : int
    cached_rows : int
        As many of the first rows are read through the page cache, the others past it.
    notify : callable
        Told, in a line, of a read that stalls, and of what a source says the first time it says something.
    stall_seconds : float
        A read that makes no progress for so long is told of.

    Attributes
    ----------
    traffic : Traffic
        Where reads are counted.
    """

    def __init__(
        self, source: Source, threads: int, cached_rows: int, notify: Callable[[str], None], stall_seconds: float
    ) -> None:
        self._source, self._cached_rows = source, cached_rows
        self._notify, self._stall_seconds = notify, stall_seconds
        self._readers, self._senders = Readers(threads), Readers(min(threads, _MOST_SENDERS))
        self._lock = Lock()
        self._words: list[str] = []
        self._told = False
        self.traffic = Traffic()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """As `Readers.submit`: behind all reads that were begun before."""
        return self._readers.submit(function, *arguments)

    def caches(self, span: Span) -> bool:
        """Whether a span is read through the page cache."""
        return span.stop <= self._cached_rows

    def begin(self, span: Span, out: Rows) -> list[Future[None]]:
        """Read a span into ``out`` in pieces, one a thread where they are large enough, cut where storage likes it."""
        cached = self.caches(span)
        return [
            self._readers.submit(self._read, start, stop, out[start - span.start : stop - span.start], cached)
            for start, stop in self._pieces(span, out.nbytes // len(out))
        ]

    def begin_sending(self, span: Span, place: Tensor, sender: Sender, after: torch.cuda.Event | None) -> Sending:
        """Have several threads send a span of the page cache to its ``place`` on a device, ``after`` an event."""
        pieces = sender.pieces(span.start, span.stop)
        shared = iter(pieces)  # each takes the next one: none waits for a slow one
        threads = min(self._senders.most, len(pieces))
        parts = [self._senders.submit(self._send, sender, after, shared, span.start, place) for _ in range(threads)]
        return Sending(shared, parts)

    def _pieces(self, span: Span, row_bytes: int) -> list[tuple[int, int]]:
        granule = self._source.read_granule
        least = max(1, _PIECE_BYTES // max(1, row_bytes))
        rows = -(-max(least, -(-span.rows // self._readers.most)) // granule) * granule
        return cut_at_granules(span.start, span.stop, rows, granule)

    def finish(self, pieces: Sequence[Future[Any]], first_row: int) -> None:
        """Wait for what `begin` gave for the rows from ``first_row`` on; raises what reading raised."""
        begun, left = time.perf_counter(), sum(not piece.done() for piece in pieces)
        # For all of them: to be woken by each would take time from the threads that read.
        while unfinished := wait(pieces, self._stall_seconds).not_done:
            stalled, left = len(unfinished) == left, len(unfinished)
            if stalled:
                seconds = time.perf_counter() - begun
                self._notify(
                    f"{self._source.locate(first_row)} and those after it: no read has finished for "
                    f"{seconds:.0f} s; still waiting, check the disk or the network"
                )
        for piece in pieces:
            piece.result()
        if self._words and not self._told:
            self._told = True
            self._notify(self._words[0])
        self.traffic.seconds_waiting += time.perf_counter() - begun

    def close(self, patience: float) -> bool:
        """As `Readers.close`."""
        ended = [threads.close(patience) for threads in (self._readers, self._senders)]
        return all(ended)

    def _read(self, start: int, stop: int, out: Rows, cached: bool) -> None:
        """What a reader thread does: rows [start, stop) into ``out``, and the count of it."""
        begun, word = _clocks(), None
        if cached:
            self._source.read_into(start, stop, out)
        else:
            word = self._source.read_uncached(start, stop, out)
        self._count(begun, out.nbytes, uncached=not cached and word is None)
        if word is not None:
            self._words.append(word)

    def _send(
        self,
        sender: Sender,
        after: torch.cuda.Event | None,
        pieces: Iterator[tuple[int, int]],
        start: int,
        place: Tensor,
    ) -> torch.cuda.Event:
        """Or this: its part of ``pieces`` on their way to their ``place`` on a device."""
        begun = _clocks()
        arrived, nbytes, waited = sender.send(after, pieces, start, place)
        self._count(begun, nbytes, waited=waited)
        return arrived

    def _count(self, begun: tuple[float, float], nbytes: int, *, uncached: bool = False, waited: float = 0.0) -> None:
        seconds, computing = (now - then for now, then in zip(_clocks(), begun, strict=True))
        with self._lock:
            traffic = self.traffic
            traffic.seconds_reading += seconds
            traffic.seconds_decoding += computing
            traffic.seconds_sending += waited
            traffic.bytes_decoded += nbytes * (self._source.read_path == "decode")
            traffic.bytes_uncached += nbytes * uncached


def _clocks() -> tuple[float, float]:
    """Of the world, and of this thread's computing."""
    return time.perf_counter(), time.thread_time()
