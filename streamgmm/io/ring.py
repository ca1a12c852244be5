"""Slots that reader threads fill while the kernel works: storage → pinned host memory → device.

On a CUDA device a copy stream moves a filled slot into one of two device buffers while the kernel reads the other.
A buffer is overwritten only after the event that the kernel's stream recorded behind its last use; a slot is refilled
only after the event of the copy that emptied it. On a CPU the chunk is the slot itself, and the same order holds
without pinning, streams or events.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from streamgmm.io.bfloat16 import as_rows, as_tensor
from streamgmm.io.integrity import unit_checksums
from streamgmm.io.plan import Span
from streamgmm.io.sources.base import Rows, Source

SLOTS = 3
"""Host slots: one being used or copied, one full, one being filled."""

DEVICE_BUFFERS = 2

_PIECE_BYTES = 1 << 20

_Planned: TypeAlias = tuple[Span, bool]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows [span.start, span.stop), of the stored type, on the device; valid until the next one is asked for.

    ``units`` are their `integrity.unit_checksums`, where they were asked for.
    """

    span: Span
    rows: Tensor
    units: bytes | None


@dataclass
class Traffic:
    """What moved, and how long the consumer stood waiting for it."""

    rows: int = 0
    bytes_read: int = 0
    seconds_waiting: float = 0.0


class Ring:
    """Streams spans of a source to a device, in order, through buffers allocated once.

    Rows that lie in memory already are handed to a CPU where they are.

    Parameters
    ----------
    source : Source
    chunk_rows : int
        Rows of the largest span.
    device : torch.device
    threads : int
        Reader threads. Their number changes the speed and nothing else.
    """

    def __init__(self, source: Source, chunk_rows: int, device: torch.device, threads: int) -> None:
        self._source = source
        self._device = device
        self._threads = threads
        self._readers = ThreadPoolExecutor(threads, "streamgmm-read")
        self.traffic = Traffic()
        on_gpu = device.type == "cuda"
        rows = min(chunk_rows, source.shape[0])
        self._slots = [_slot(source, rows, pinned=on_gpu) for _ in range(SLOTS)]
        self._buffers = [torch.empty_like(self._slots[0], device=device) for _ in range(DEVICE_BUFFERS * on_gpu)]

    def stream(self, spans: Iterable[Span], checked_rows: int = 0) -> Generator[Chunk]:
        """Chunks of ``spans``, in order, the first ``checked_rows`` rows with checksums.

        Reading runs ahead by as many slots as there are.

        Raises
        ------
        DataError
            From a reader thread, at the chunk it belongs to.
        """
        on_gpu = self._device.type == "cuda"
        planned = _with_checks(spans, checked_rows)
        return self._stream_to_gpu(planned) if on_gpu else self._stream_on_host(planned)

    def _stream_on_host(self, spans: Iterator[_Planned]) -> Generator[Chunk]:
        free, reading = deque(self._slots), deque[_Reading]()
        try:
            while True:
                self._start_reading(spans, free, reading)
                if not reading:
                    return
                item = reading.popleft()
                self._wait(item)
                yield Chunk(item.span, item.rows, item.checksums())
                free.append(item.slot)
        finally:
            _abandon(reading)

    def _stream_to_gpu(self, spans: Iterator[_Planned]) -> Generator[Chunk]:
        compute, copy = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        free, reading = deque(self._slots), deque[_Reading]()
        # A buffer with the event after which it may be overwritten.
        buffers = deque((buffer, torch.cuda.Event()) for buffer in self._buffers)
        copying, staged = deque[_Staged](), deque[_Staged]()

        def reclaim(*, wait: bool) -> None:
            """Free the slots that were copied, and read for their checksums; ``wait`` for the first."""
            while copying and (wait or (copying[0].copied.query() and copying[0].item.checked())):
                done = copying.popleft()
                done.copied.synchronize()
                done.item.checksums()
                free.append(done.item.slot)
                wait = False

        def stage() -> None:
            item = reading.popleft()
            self._wait(item)
            buffer, released = buffers.popleft()
            with torch.cuda.stream(copy):
                copy.wait_event(released)
                rows = buffer[: item.span.rows]
                rows.copy_(item.rows, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(copy)
            copying.append(_Staged(item, rows, buffer, copied))
            staged.append(copying[-1])

        try:
            while True:
                reclaim(wait=not free and not reading)
                self._start_reading(spans, free, reading)
                # Ready data is copied under the running kernel; data still being read is not waited for.
                while reading and buffers and (not staged or reading[0].done()):
                    stage()
                if not staged:
                    return
                current = staged.popleft()
                compute.wait_event(current.copied)
                yield Chunk(current.item.span, current.rows, current.item.checksums())
                released = torch.cuda.Event()
                released.record(compute)
                buffers.append((current.buffer, released))
        finally:
            _abandon(deque([*(staged.item for staged in copying), *reading]))
            copy.synchronize()

    def _start_reading(self, spans: Iterator[_Planned], free: deque[Tensor], reading: deque[_Reading]) -> None:
        while free:
            planned = next(spans, None)
            if planned is None:
                return
            span, checked = planned
            slot = free.popleft()
            rows, pieces = slot[: span.rows], list[Future[None]]()
            # The device reads its own memory only, so rows that lie in memory serve a CPU alone.
            there = self._source.view(span.start, span.stop) if self._device.type == "cpu" else None
            if there is None:
                pieces = self._submit(span, as_rows(rows))
            else:
                rows = as_tensor(there)
            # Queued behind the pieces that it waits for, so it never holds the thread they need.
            units = self._readers.submit(_units_of, pieces, as_rows(rows)) if checked else None
            reading.append(_Reading(span, slot, rows, pieces, units))

    def _submit(self, span: Span, out: Rows) -> list[Future[None]]:
        """Read a span in pieces, one a thread where they are large enough, cut where storage likes it."""
        granule = self._source.read_granule
        least = max(1, _PIECE_BYTES // max(1, out.nbytes // len(out)))
        rows = -(-max(least, -(-len(out) // self._threads)) // granule) * granule
        first = span.start - span.start % granule
        cuts = [max(start, span.start) for start in range(first, span.stop, rows)] + [span.stop]
        return [
            self._readers.submit(self._source.read_into, start, stop, out[start - span.start : stop - span.start])
            for start, stop in pairwise(cuts)
        ]

    def _wait(self, item: _Reading) -> None:
        begun = time.perf_counter()
        for piece in item.pieces:
            piece.result()
        self.traffic.seconds_waiting += time.perf_counter() - begun
        self.traffic.rows += item.span.rows
        self.traffic.bytes_read += item.rows.nbytes

    def close(self) -> None:
        """Stop the reader threads."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class _Reading:
    span: Span
    slot: Tensor
    rows: Tensor
    pieces: list[Future[None]]
    units: Future[bytes] | None

    def done(self) -> bool:
        return all(piece.done() for piece in self.pieces)

    def checked(self) -> bool:
        return self.units is None or self.units.done()

    def checksums(self) -> bytes | None:
        return None if self.units is None else self.units.result()


@dataclass(frozen=True, eq=False)
class _Staged:
    item: _Reading
    rows: Tensor
    buffer: Tensor
    copied: torch.cuda.Event


def _with_checks(spans: Iterable[Span], checked_rows: int) -> Iterator[_Planned]:
    """Each span, and whether it belongs to the first ``checked_rows`` rows."""
    planned = 0
    for span in spans:
        yield span, planned < checked_rows
        planned += span.rows


def _units_of(pieces: list[Future[None]], rows: Rows) -> bytes:
    for piece in pieces:
        piece.result()
    return unit_checksums(rows)


def _abandon(reading: deque[_Reading]) -> None:
    """Let reads in flight end before their slots are reused; what they raise no longer matters."""
    futures: list[Future[None] | Future[bytes]] = []
    for item in reading:
        futures += [*item.pieces, *([] if item.units is None else [item.units])]
    for future in futures:
        if not future.cancel():
            future.exception()
    reading.clear()


def _slot(source: Source, rows: int, *, pinned: bool) -> Tensor:
    """Room for ``rows``; a power of two of bytes when pinned, because the allocator would round it up anyway."""
    n, d = rows, source.shape[1]
    dtype = as_tensor(np.empty(0, source.dtype)).dtype
    if not pinned:
        return torch.empty((n, d), dtype=dtype)
    needed = n * d * dtype.itemsize
    raw = torch.empty(1 << (needed - 1).bit_length(), dtype=torch.uint8, pin_memory=True)
    return raw[:needed].view(dtype).view(n, d)
