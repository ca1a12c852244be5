"""Slots that reader threads fill while the kernel works: storage → pinned host memory → device.

On a CUDA device a copy stream moves a filled slot into one of two device buffers while the kernel reads the other.
A buffer is overwritten only after the event that the kernel's stream recorded behind its last use; a slot is refilled
only after the event of the copy that emptied it. On a CPU the chunk is the slot itself, and the same order holds
without pinning, streams or events.

Chunks that a tier has room for are read, or copied, into their place there, and need neither slot nor buffer again.
On a device they may stay in a narrower form, into which they are brought after their first use; whoever then finds that
it does not do for some rows asks for these as they are stored.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from streamgmm.io.bfloat16 import as_rows, as_tensor
from streamgmm.io.integrity import unit_checksums
from streamgmm.io.on_device import OnDevice
from streamgmm.io.plan import Span
from streamgmm.io.reading import SpanReader
from streamgmm.io.residency import Narrowing, Tier, cached_rows
from streamgmm.io.sources.base import Rows, Source
from streamgmm.io.traffic import Traffic

SLOTS = 3
"""Host slots: one being used or copied, one full, one being filled."""

DEVICE_BUFFERS = 2

STALL_SECONDS = 30.0
"""A read that makes no progress for so long is told of."""

PATIENCE_SECONDS = 5.0
"""How long the end waits for reads in flight before it leaves them behind."""

_Planned: TypeAlias = tuple[Span, bool]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows [span.start, span.stop) on the device; valid until the next chunk is asked for.

    Attributes
    ----------
    span : Span
    rows : tensor
        (n, D) of the stored type; where there is ``stored``, the bytes that `Ring.keep_as`'s form left of them.
    units : callable or None
        Begins to find their `integrity.unit_checksums`, where these were asked for; what it gives waits for them.
    stored : callable or None
        Reads the rows from ``first`` to before ``last`` of the chunk, multiples of 256 or its end, from the source:
        (last − first, D) of the stored type, on the device. Raises DataError where they have changed.
    """

    span: Span
    rows: Tensor
    units: Callable[[], Callable[[], bytes]] | None
    stored: Callable[[int, int], Tensor] | None = None


class Ring:
    """Streams spans of a source to a device, in order, through buffers allocated once.

    Rows that lie in memory already are handed to a CPU where they are, and copied from there to a GPU if that memory is
    pinned.

    Parameters
    ----------
    source : Source
    chunk_rows : int
        Rows of the largest span.
    device : torch.device
    threads : int
        Reader threads. Their number changes the speed and nothing else.
    host_memory : int, optional
        Bytes of host memory for rows. On a GPU, and for data that must be decoded, what the slots leave of it keeps the
        first chunks; else that many bytes of the data's beginning are left in the page cache. What does not fit is read
        past the page cache. None: nothing is kept, and caching is left to the system.
    device_memory : int
        Bytes of a GPU's memory, besides the buffers, that keep the first chunks.
    recheck : bool
        Whether rows that are not in memory come with checksums whenever they are read, not only where `stream` asks
        for them.
    notify : callable, optional
        Told, in a line, what the user should know: a read that stalls (again after every ``stall_seconds``), a file
        system without ``O_DIRECT``. Called from `stream`; what it raises ends the stream.
    stall_seconds : float
    """

    def __init__(
        self,
        source: Source,
        chunk_rows: int,
        device: torch.device,
        threads: int,
        *,
        host_memory: int | None = None,
        device_memory: int = 0,
        recheck: bool = False,
        notify: Callable[[str], None] | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._source = source
        self._device = device
        self._recheck = recheck and source.view(0, 1) is None
        self._notify = notify or (lambda text: None)
        on_gpu = device.type == "cuda"
        rows = min(chunk_rows, source.shape[0])
        self._slots = [_slot(source, rows, pinned=on_gpu) for _ in range(SLOTS)]
        self._buffers = [torch.empty_like(self._slots[0], device=device) for _ in range(DEVICE_BUFFERS * on_gpu)]
        self._on_device = OnDevice(Tier(device_memory if on_gpu else 0, self._device_block, exact=True))
        resident = host_memory is not None and (on_gpu or source.read_path in ("decode", "objects"))
        budget = max(0, (host_memory or 0) - sum(slot.untyped_storage().nbytes() for slot in self._slots))
        self._on_host = Tier(budget if resident else 0, _pinned if on_gpu else _pageable)
        cached = cached_rows(source, host_memory, resident=resident)
        self._reader = SpanReader(source, threads, cached, self._notify, stall_seconds)

    @property
    def traffic(self) -> Traffic:
        """What was moved; one that was given counts on."""
        return self._reader.traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self._reader.traffic = traffic

    def keep_as(self, narrowing: Narrowing | None) -> None:
        """Keep rows on the device in this form from now on; None: as they are stored, as in the beginning.

        What was kept before is dropped. To be called while nothing is streamed.
        """
        self._on_device.keep_as(narrowing)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of another size do not fit, and would be held beside the new ones

    @property
    def narrowing_pays(self) -> bool:
        """Whether few enough of the narrow rows had to be read again as they are stored."""
        return self._on_device.narrowing_pays

    def stream(self, spans: Iterable[Span], checked_rows: int = 0) -> Generator[Chunk]:
        """Chunks of ``spans``, in order, the first ``checked_rows`` rows with checksums.

        Reading runs ahead by as many slots as there are; ``spans`` is asked for more as it goes, so that one that
        continues with the next pass has its chunks read while this one ends.

        Raises
        ------
        DataError
            From a reader thread, at the chunk it belongs to.
        """
        on_gpu = self._device.type == "cuda"
        planned = _Ahead(_with_checks(spans, checked_rows))
        return self._stream_to_gpu(planned) if on_gpu else self._stream_on_host(planned)

    def _stream_on_host(self, spans: _Ahead) -> Generator[Chunk]:
        free, reading = deque(self._slots), deque[_Reading]()
        try:
            while True:
                self._start_reading(spans, free, reading)
                if not reading:
                    return
                item = reading[0]
                self._wait(item)
                reading.popleft()
                yield Chunk(item.span, item.rows, None if item.units is None else partial(_coming, item.units))
                if item.slot is not None:
                    free.append(item.slot)
        finally:
            self._abandon(reading)

    def _stream_to_gpu(self, spans: _Ahead) -> Generator[Chunk]:
        compute, copy = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        # Memory that the allocator gave out may still be read by a kernel for which it was freed.
        copy.wait_stream(compute)
        free, reading = deque(self._slots), deque[_Reading]()
        # A buffer with the event after which it may be overwritten.
        buffers = deque((buffer, torch.cuda.Event()) for buffer in self._buffers)
        copying, staged = deque[_Copying](), deque[_Staged]()

        def reclaim(*, wait: bool) -> None:
            """Free the slots that were copied; ``wait`` for the first."""
            while copying and (wait or copying[0].copied.query()):
                done = copying.popleft()
                done.copied.synchronize()
                self.traffic.seconds_copying += done.seconds()
                if done.item.slot is not None:
                    free.append(done.item.slot)
                wait = False

        def stage() -> None:
            item = reading[0]
            if item.resident:
                self._count_resident(item)
                reading.popleft()
                staged.append(_Staged(item, item.rows, None, None))
                return
            self._wait(item)
            reading.popleft()
            buffer: _Buffer | None = None
            with torch.cuda.stream(copy):
                if item.place is None:
                    buffer = buffers.popleft()
                    copy.wait_event(buffer[1])
                rows = item.place if buffer is None else buffer[0][: item.span.rows]
                assert rows is not None
                begun, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record(copy)
                rows.copy_(item.rows, non_blocking=True)
                copied.record(copy)
            self.traffic.bytes_copied += rows.nbytes
            if item.place is not None:
                self._on_device.hold(item.span)
            copying.append(_Copying(item, begun, copied))
            staged.append(_Staged(item, rows, buffer, copied))

        def may_stage() -> bool:
            """Ready data is copied under the running kernel; data still being read is not waited for."""
            if not reading or len(staged) >= DEVICE_BUFFERS:
                return False
            needs_buffer = not reading[0].resident and reading[0].place is None
            return (bool(buffers) or not needs_buffer) and (not staged or reading[0].done())

        try:
            while True:
                reclaim(wait=not free and not reading)
                self._start_reading(spans, free, reading)
                while may_stage():
                    stage()
                if not staged:
                    return
                current = staged.popleft()
                if current.copied is not None:
                    compute.wait_event(current.copied)
                chunk = self._chunk(current)
                yield chunk
                if current.item.narrow is not None:
                    self._on_device.narrow(chunk.span, chunk.rows, current.item.narrow, chunk.units)
                if current.buffer is not None:
                    released = torch.cuda.Event()
                    released.record(compute)
                    buffers.append((current.buffer[0], released))
        finally:
            self._abandon(deque([*(done.item for done in copying), *reading]))
            copy.synchronize()
            self.traffic.seconds_copying += sum(done.seconds() for done in copying)

    def _start_reading(self, spans: _Ahead, free: deque[Tensor], reading: deque[_Reading]) -> None:
        while len(reading) < SLOTS and (planned := spans.head()) is not None:
            item = self._begin(*planned, free)
            if item is None:
                return
            spans.drop_head()
            reading.append(item)

    def _begin(self, span: Span, checked: bool, free: deque[Tensor]) -> _Reading | None:
        """Begin to read a span, or find it where it lies; None where that takes a slot and none is free."""
        rows, pieces, slot, place = self._rows_in_memory(span), list[Future[None]](), None, None
        held = kept = False
        if rows is None or self._device.type == "cuda":
            place = self._on_device.place(span, self._size(span))
        if place is not None and self._on_device.holds(span):
            if not checked:
                there = self._typed(place) if self._on_device.narrowing is None else place
                return _Reading(span, None, there, [], None, resident=True)
            place = None  # what checksums are wanted of is read anew; the place may be in use
        if rows is None:
            room = self._on_host.place(span, self._size(span)) if place is None else None
            if room is None and not free:
                return None
            if room is None:
                slot = free.popleft()
                rows = slot[: span.rows]
            else:
                rows, held = self._typed(room), self._on_host.holds(span)
                kept = not held
            if not held:
                pieces = self._reader.begin(span, as_rows(rows))
        # Queued behind the pieces that it waits for, so it never holds the thread they need.
        checked |= self._recheck and bool(pieces)
        on_gpu = self._device.type == "cuda"
        units = self._reader.submit(_units_of, pieces, as_rows(rows)) if checked and not on_gpu else None
        narrow = None if self._on_device.narrowing is None else place
        stays = None if place is None or narrow is not None else self._typed(place)
        return _Reading(span, slot, rows, pieces, units, checked, place=stays, narrow=narrow, held=held, kept=kept)

    def _chunk(self, staged: _Staged) -> Chunk:
        item, stored = staged.item, None
        if item.resident and self._on_device.narrowing is not None:
            self._on_device.handed_out(item.span)
            stored = partial(self._read_again, item.span)
        units = partial(_units_on_device, staged.rows) if item.checked else None
        return Chunk(item.span, staged.rows, units, stored)

    def _read_again(self, span: Span, first: int, last: int) -> Tensor:
        """As `Chunk.stored`; of a chunk that stays narrow."""
        start, stop = span.start + first, span.start + last
        rows = torch.empty((last - first, self._source.shape[1]), dtype=self._slots[0].dtype)
        self._reader.finish(self._reader.begin(Span(start, stop, span.segment), as_rows(rows)), start)
        self._on_device.read_again(span, first, rows, self._source)
        self.traffic.bytes_read += rows.nbytes
        self.traffic.bytes_copied += rows.nbytes
        return rows.to(self._buffers[0].device)

    def _rows_in_memory(self, span: Span) -> Tensor | None:
        """Rows that need not be read: any that lie in memory for a CPU, those in pinned memory for a GPU."""
        there = self._source.view(span.start, span.stop)
        if there is None:
            return None
        rows = as_tensor(there)
        return rows if self._device.type == "cpu" or rows.is_pinned() else None

    def _wait(self, item: _Reading) -> None:
        """Wait until a span is read; raises what its reading raised."""
        self._reader.finish(item.pieces, item.span.start)
        traffic = self.traffic
        if item.held:
            self._count_resident(item)
            return
        if item.kept:
            self._on_host.hold(item.span)
        traffic.rows += item.span.rows
        traffic.bytes_read += item.rows.nbytes

    def _count_resident(self, item: _Reading) -> None:
        self.traffic.rows += item.span.rows
        if item.resident:
            self.traffic.bytes_from_device += self._size(item.span)
        else:
            self.traffic.bytes_from_host += item.rows.nbytes

    def _abandon(self, reading: deque[_Reading]) -> None:
        """Let reads in flight end before their slots are reused; what they raise no longer matters.

        A read that does not end keeps its slot, for which there is a new one.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        for item in reading:
            futures: list[Future[None] | Future[bytes]] = [*item.pieces, *([] if item.units is None else [item.units])]
            running: list[Future[Any]] = [future for future in futures if not future.cancel()]
            stuck = wait(running, max(0.0, deadline - time.monotonic())).not_done
            if stuck and item.slot is not None:
                index = next(i for i, slot in enumerate(self._slots) if slot is item.slot)
                self._slots[index] = torch.empty_like(item.slot, pin_memory=item.slot.is_pinned())
        reading.clear()

    def _size(self, span: Span) -> int:
        return span.rows * self._source.shape[1] * self._source.dtype.itemsize

    def _typed(self, memory: Tensor) -> Tensor:
        """Bytes as rows of the stored type."""
        return memory.view(self._slots[0].dtype).view(-1, self._source.shape[1])

    def _device_block(self, size: int) -> Tensor:
        block = torch.empty(size, dtype=torch.uint8, device=self._device)
        # It may still be read by a kernel for which it was freed, and copies do not wait for kernels.
        torch.cuda.current_stream(self._device).synchronize()
        return block

    def close(self) -> None:
        """Stop the reader threads and let go of all memory; a thread that hangs in a read is left behind, and the
        process may end without it.
        """
        if not self._reader.close(PATIENCE_SECONDS):
            self._notify(f"{self._source.name}: a read has not ended and is left behind; check the disk or the network")
        # Whoever still holds the ring, for its figures, holds no memory with it.
        self._slots, self._buffers = [], []
        self._on_device, self._on_host = OnDevice(Tier(0, self._device_block)), Tier(0, _pageable)

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class _Reading:
    """A span on its way: its rows on the host, or, where ``resident``, on the device.

    Checksums are wanted of them where ``checked``; on a CPU these are the ``units``. ``slot`` is to be freed after use;
    ``place`` is where the rows will stay on the device, and ``narrow`` where they will in a narrower form. The host's
    tier has ``held`` them, or they are read to be ``kept`` there.
    """

    span: Span
    slot: Tensor | None
    rows: Tensor
    pieces: list[Future[None]]
    units: Future[bytes] | None
    checked: bool = False
    place: Tensor | None = None
    narrow: Tensor | None = None
    resident: bool = False
    held: bool = False
    kept: bool = False

    def done(self) -> bool:
        return all(piece.done() for piece in self.pieces)


_Buffer: TypeAlias = tuple[Tensor, torch.cuda.Event]


@dataclass(frozen=True, eq=False)
class _Copying:
    item: _Reading
    begun: torch.cuda.Event
    copied: torch.cuda.Event

    def seconds(self) -> float:
        """On the device's clock; the copy has ended."""
        milliseconds: float = self.begun.elapsed_time(self.copied)
        return milliseconds / 1e3


@dataclass(frozen=True, eq=False)
class _Staged:
    item: _Reading
    rows: Tensor
    buffer: _Buffer | None
    copied: torch.cuda.Event | None


class _Ahead:
    """Spans to come, each with whether it is checked; the next one can be looked at before it is taken."""

    def __init__(self, spans: Iterable[_Planned]) -> None:
        self._spans = iter(spans)
        self._head: _Planned | None = None

    def head(self) -> _Planned | None:
        """The next one; None at the end."""
        if self._head is None:
            self._head = next(self._spans, None)
        return self._head

    def drop_head(self) -> None:
        self._head = None


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


def _slot(source: Source, rows: int, *, pinned: bool) -> Tensor:
    """Room for ``rows``; a power of two of bytes when pinned, because the allocator would round it up anyway."""
    n, d = rows, source.shape[1]
    dtype = as_tensor(np.empty(0, source.dtype)).dtype
    if not pinned:
        return torch.empty((n, d), dtype=dtype)
    needed = n * d * dtype.itemsize
    return _pinned(1 << (needed - 1).bit_length())[:needed].view(dtype).view(n, d)


def _coming(units: Future[bytes]) -> Callable[[], bytes]:
    return units.result


def _units_on_device(rows: Tensor) -> Callable[[], bytes]:
    if not rows.is_cuda:
        return partial(unit_checksums, as_rows(rows))
    from streamgmm.io.device_checksums import device_unit_checksums  # Triton, which only a GPU needs

    return device_unit_checksums(rows)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _pageable(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
