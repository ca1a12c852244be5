"""Rows that readers send on to a GPU piece by piece, through small pinned memory of each thread's own.

A piece that was just read is copied out of the processor's cache: the host's memory is passed once, where a slot as
long as a chunk is written to memory and read again. What limits it is the interpreter, which a thread lets go of to
read and gets back after the others: so a thread reads many pieces in one task, and hands each on in one call that keeps
the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import cycle
from threading import local

import torch
from torch import Tensor

from streamgmm.io.bfloat16 import Rows, as_rows
from streamgmm.io.driver import begin_copy
from streamgmm.io.plan import cut_at_granules
from streamgmm.io.sources.base import Source

_PIECE_BYTES = 8 << 20
"""Two of them a thread; smaller ones wait for the interpreter, larger ones do not stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Sending:
    """A span that threads send on.

    Attributes
    ----------
    pieces : iterator of (int, int)
        Rows of it that no thread has taken yet.
    parts : futures
        One a thread: ends when it finds no more pieces, and gives the event at which its own lie on the device.
    """

    pieces: Iterator[tuple[int, int]]
    parts: Sequence[Future[torch.cuda.Event]]

    def arrived(self) -> list[torch.cuda.Event]:
        """The events after which the whole span lies on the device; raises what reading raised."""
        return [part.result() for part in self.parts]

    def stop(self) -> None:
        """Let threads end with the piece they are at."""
        for _ in self.pieces:
            pass

    def wait(self) -> None:
        """Wait for the copies of the threads that have ended."""
        for part in self.parts:
            if part.done() and not part.cancelled() and part.exception() is None:
                part.result().synchronize()


@dataclass(frozen=True, eq=False)
class _Memory:
    """Pinned memory of a piece: it, where it lies, and as rows; it may be filled again after the event."""

    memory: Tensor
    address: int
    rows: Rows
    copied: torch.cuda.Event


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
        self._row_bytes, granule = _row_bytes(source), source.read_granule
        rows = min(most_rows, _PIECE_BYTES // self._row_bytes)
        self._rows = max(1, rows // granule) * granule
        self._threads = local()
        self._memory: list[_Memory] = []
        self._streams: list[torch.cuda.Stream] = []

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows [start, stop) as pieces (first, end) that fit a thread's memory, cut where storage likes it."""
        return cut_at_granules(start, stop, self._rows, self._source.read_granule)

    def send(
        self, after: torch.cuda.Event | None, pieces: Iterator[tuple[int, int]], start: int, place: Tensor
    ) -> tuple[torch.cuda.Event, int, float]:
        """What this thread gets of ``pieces`` to ``place``, rows from ``start`` on a device, ``after`` an event.

        Each thread that sends of a span takes the next of its pieces. Gives the event at which this one's lie there,
        which is not waited for, their bytes, and the seconds in which reading waited for copies. To be called by reader
        threads. Raises as the source; nothing is on its way then.
        """
        memory_in_turn, sent, waited = self._of_thread(place.dtype), 0, 0.0
        stream: torch.cuda.Stream = self._threads.stream
        first = place.data_ptr() - start * self._row_bytes
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            try:
                for (begin, end), memory in zip(pieces, memory_in_turn, strict=False):
                    waited += _waited_for(memory.copied)
                    self._source.read_into(begin, end, memory.rows[: end - begin])
                    size = (end - begin) * self._row_bytes
                    begin_copy(first + begin * self._row_bytes, memory.address, size, stream)
                    memory.copied.record(stream)
                    sent += size
            except BaseException:
                stream.synchronize()
                raise
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return arrived, sent, waited

    def close(self) -> None:
        """Let go of all memory once what was sent has arrived."""
        for stream in self._streams:
            stream.synchronize()
        self._memory = []

    def _of_thread(self, dtype: torch.dtype) -> Iterator[_Memory]:
        """This thread's pieces of memory, in turn for ever."""
        if not hasattr(self._threads, "memory"):
            self._threads.stream = torch.cuda.Stream(self._device)
            own = [self._new_memory(dtype, self._threads.stream) for _ in range(2)]
            self._threads.memory = cycle(own)
            # Which outlives the thread: copies may.
            self._memory += own
            self._streams.append(self._threads.stream)
        memory: Iterator[_Memory] = self._threads.memory
        return memory

    def _new_memory(self, dtype: torch.dtype, stream: torch.cuda.Stream) -> _Memory:
        size = self._rows * self._row_bytes
        memory = self._allocate(size)
        rows = as_rows(memory[:size].view(dtype).view(self._rows, -1))
        copied = torch.cuda.Event()
        copied.record(stream)
        return _Memory(memory, memory.data_ptr(), rows, copied)


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
