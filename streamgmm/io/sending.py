"""Rows that readers send on to a GPU piece by piece, through small pinned memory of each thread's own.

A piece that was just read is copied out of the processor's cache: the host's memory is passed once, where a slot as
long as a chunk is written to memory and read again. A thread reads its share of a span piece after piece in one task,
since what a task costs (the interpreter, handed from thread to thread) is half a millisecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from threading import local

import torch
from torch import Tensor

from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.sources.base import Source

_PIECE_BYTES = 16 << 20
"""Two of them a thread; smaller ones wait for the interpreter, most of all while the consumer needs it."""


class Sender:
    """Reads rows of a source through the page cache and sends them on.

    Parameters
    ----------
    source : Source
        One whose `read_granule` fits a piece (`sends`).
    most_rows : int
        Rows of the longest span.
    device : torch.device
    allocate : callable
        Gives so many bytes of pinned memory, uint8.
    """

    def __init__(self, source: Source, most_rows: int, device: torch.device, allocate: Callable[[int], Tensor]) -> None:
        self._source, self._device, self._allocate = source, device, allocate
        granule = source.read_granule
        rows = min(most_rows, _PIECE_BYTES // _row_bytes(source))
        self._rows = max(1, rows // granule) * granule
        self._threads = local()

    def send(
        self, after: torch.cuda.Event | None, start: int, stop: int, place: Tensor
    ) -> tuple[torch.cuda.Event, float]:
        """Rows [start, stop) to ``place``, (stop − start, D) on the device, which is written ``after`` an event.

        Gives the event at which they lie there, which is not waited for, and the seconds in which reading waited for
        copies. To be called by reader threads. Raises as the source; nothing is on its way then.
        """
        first = start - start % self._source.read_granule
        cuts = [max(cut, start) for cut in range(first, stop, self._rows)] + [stop]
        pieces, waited = self._of_thread(place.dtype), 0.0
        stream: torch.cuda.Stream = self._threads.stream
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            try:
                for i, (begin, end) in enumerate(pairwise(cuts)):
                    memory, copied = pieces[i % 2]
                    waited += _waited_for(copied)
                    piece = memory[: end - begin]
                    self._source.read_into(begin, end, as_rows(piece))
                    place[begin - start : end - start].copy_(piece, non_blocking=True)
                    copied.record(stream)
            except BaseException:
                stream.synchronize()
                raise
            sent = torch.cuda.Event()
            sent.record(stream)
        return sent, waited

    def _of_thread(self, dtype: torch.dtype) -> list[tuple[Tensor, torch.cuda.Event]]:
        """This thread's two pieces of memory, each with the event after which it may be filled again."""
        if not hasattr(self._threads, "pieces"):
            size = self._rows * _row_bytes(self._source)
            memory = [self._allocate(size).view(dtype).view(self._rows, -1) for _ in range(2)]
            self._threads.stream = torch.cuda.Stream(self._device)
            self._threads.pieces = [(each, torch.cuda.Event()) for each in memory]
        pieces: list[tuple[Tensor, torch.cuda.Event]] = self._threads.pieces
        return pieces


def sends(source: Source) -> bool:
    """Whether rows of a source are best read in pieces as small as are sent on; a store is asked for longer ranges."""
    return source.read_path != "objects" and source.read_granule * _row_bytes(source) <= _PIECE_BYTES


def _row_bytes(source: Source) -> int:
    return source.shape[1] * source.dtype.itemsize


def _waited_for(copied: torch.cuda.Event) -> float:
    if copied.query():  # as a rule; waiting would hand the interpreter on
        return 0.0
    begun = time.perf_counter()
    copied.synchronize()
    return time.perf_counter() - begun
