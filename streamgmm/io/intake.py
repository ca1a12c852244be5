"""Spans on their way: read into a slot, into their place in a tier, or on to a device; or found where they lie."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from streamgmm.io.bfloat16 import as_rows, as_tensor
from streamgmm.io.integrity import unit_checksums
from streamgmm.io.on_device import OnDevice
from streamgmm.io.plan import Span
from streamgmm.io.reading import SpanReader
from streamgmm.io.residency import Tier
from streamgmm.io.sending import Sender, Sending
from streamgmm.io.sources.base import Rows, Source
from streamgmm.io.traffic import Traffic

SLOTS = 3
"""Host slots: one being used or copied, one full, one being filled."""

DEVICE_BUFFERS = 2

PATIENCE_SECONDS = 5.0
"""How long the end waits for reads in flight before it leaves them behind."""

Planned: TypeAlias = tuple[Span, bool]
"""A span, and whether it comes with checksums."""

Buffer: TypeAlias = tuple[Tensor, torch.cuda.Event]
"""Room for a chunk on a device, with the event after which it may be overwritten."""


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


@dataclass(frozen=True, eq=False)
class Reading:
    """A span on its way: its rows on the host, or, where ``resident`` or sent on, on the device.

    Checksums are wanted of them where ``checked``; on a CPU these are the ``units``. ``slot`` is to be freed after use;
    ``place`` is where the rows will stay on the device, and ``narrow`` where they will in a narrower form. The host's
    tier has ``held`` them, or they are read to be ``kept`` there. ``sending`` brings them to their place, or into
    ``buffer``.
    """

    span: Span
    rows: Tensor
    pieces: Sequence[Future[Any]] = ()
    slot: Tensor | None = None
    units: Future[bytes] | None = None
    checked: bool = False
    place: Tensor | None = None
    narrow: Tensor | None = None
    resident: bool = False
    held: bool = False
    kept: bool = False
    sending: Sending | None = None
    buffer: Buffer | None = None

    def done(self) -> bool:
        return all(piece.done() for piece in self.pieces)

    @property
    def needs_buffer(self) -> bool:
        """Whether it is yet to be copied into a buffer of the device."""
        return not self.resident and self.place is None and self.sending is None


class Ahead:
    """Spans to come; the next one can be looked at before it is taken."""

    def __init__(self, spans: Iterable[Planned]) -> None:
        self._spans = iter(spans)
        self._head: Planned | None = None

    def head(self) -> Planned | None:
        """The next one; None at the end."""
        if self._head is None:
            self._head = next(self._spans, None)
        return self._head

    def drop_head(self) -> None:
        self._head = None


class Intake:
    """Where spans of a source are read to.

    Parameters
    ----------
    source : Source
    device : torch.device
    reader : SpanReader
    allocate : callable
        Gives a slot's memory.
    buffers : list of tensors
        Room for chunks on a GPU.
    on_host, on_device : Tier, OnDevice
        What stays.
    sender : Sender or None
        What brings rows from the page cache to a GPU.
    recheck : bool
        Whether rows that are not in memory come with checksums whenever they are read.

    Attributes
    ----------
    slots : list of tensors
        Those made so far. One is made when it is needed: what lies in memory, or is sent on, needs none.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        reader: SpanReader,
        *,
        allocate: Callable[[], Tensor],
        buffers: list[Tensor],
        on_host: Tier,
        on_device: OnDevice,
        sender: Sender | None,
        recheck: bool,
    ) -> None:
        self._source, self._device, self._reader, self._allocate = source, device, reader, allocate
        self._sender, self._recheck = sender, recheck
        self.buffers, self.on_host, self.on_device = buffers, on_host, on_device
        self.slots: list[Tensor] = []

    @property
    def traffic(self) -> Traffic:
        """Where what moves is counted."""
        return self._reader.traffic

    def ahead(self, spans: Ahead, reading: deque[Reading], free: deque[Tensor], buffers: deque[Buffer]) -> None:
        """Begin to read what comes next into ``free`` slots or ``buffers``, as far as there are any."""
        while len(reading) < SLOTS and (planned := spans.head()) is not None:
            # Those in front of it that will need a buffer come first.
            spare = len(buffers) - sum(item.needs_buffer for item in reading)
            item = self._begin(*planned, free, buffers if spare > 0 else deque())
            if item is None:
                return
            spans.drop_head()
            reading.append(item)

    def _begin(self, span: Span, checked: bool, free: deque[Tensor], buffers: deque[Buffer]) -> Reading | None:
        """Begin to read a span, or find it where it lies; None where that takes what is not free."""
        on_gpu, here = self._device.type == "cuda", self._rows_in_memory(span)
        place = self.on_device.place(span, self._size(span)) if here is None or on_gpu else None
        if place is not None and self.on_device.holds(span):
            if not checked:
                there = self._typed(place) if self.on_device.narrowing is None else place
                return Reading(span, there, resident=True)
            place = None  # what checksums are wanted of is read anew; the place may be in use
        narrow = None if self.on_device.narrowing is None else place
        stays = None if place is None or narrow is not None else self._typed(place)
        reading = partial(Reading, span, place=stays, narrow=narrow)
        if here is not None:
            return reading(here, checked=checked, units=self._units([], here, checked))
        room = self.on_host.place(span, self._size(span)) if place is None else None
        if room is not None and self.on_host.holds(span):
            held = self._typed(room)
            return reading(held, checked=checked, units=self._units([], held, checked), held=True)
        checked |= self._recheck
        if room is None and self._sender is not None and self._reader.caches(span):
            if stays is None and not buffers:
                return None
            buffer = buffers.popleft() if stays is None else None
            rows, after = (stays, None) if buffer is None else (buffer[0][: span.rows], buffer[1])
            assert rows is not None
            sending = self._reader.begin_sending(span, rows, self._sender, after)
            return reading(rows, sending.parts, checked=checked, sending=sending, buffer=buffer)
        slot = self._free_slot(free) if room is None else None
        if room is not None:
            rows = self._typed(room)
        elif slot is not None:
            rows = slot[: span.rows]
        else:
            return None
        pieces = self._reader.begin(span, as_rows(rows))
        units = self._units(pieces, rows, checked)
        return reading(rows, pieces, slot=slot, units=units, checked=checked, kept=slot is None)

    def _units(self, pieces: Sequence[Future[None]], rows: Tensor, checked: bool) -> Future[bytes] | None:
        """Checksums of rows once they are read; a GPU computes its own."""
        if not checked or self._device.type == "cuda":
            return None
        # Queued behind the pieces that it waits for, so it never holds the thread they need.
        return self._reader.submit(_units_of, pieces, as_rows(rows))

    def has_slot(self, free: deque[Tensor]) -> bool:
        """Whether one is free, or can be made."""
        return bool(free) or len(self.slots) < SLOTS

    def _free_slot(self, free: deque[Tensor]) -> Tensor | None:
        if not free and self.has_slot(free):
            self.slots.append(self._typed(self._allocate()))
            free.append(self.slots[-1])
        return free.popleft() if free else None

    def finish(self, item: Reading) -> None:
        """Wait until a span is read; raises what its reading raised."""
        self._reader.finish(item.pieces, item.span.start)
        traffic = self.traffic
        traffic.rows += item.span.rows
        if item.resident:
            traffic.bytes_from_device += self._size(item.span)
        elif item.held:
            traffic.bytes_from_host += item.rows.nbytes
        else:
            traffic.bytes_read += item.rows.nbytes
        if item.kept:
            self.on_host.hold(item.span)

    def read_again(self, span: Span, first: int, last: int) -> Tensor:
        """As `Chunk.stored`, on the host; of a chunk that stays narrow."""
        start, stop = span.start + first, span.start + last
        rows = torch.empty((last - first, self._source.shape[1]), dtype=_dtype(self._source))
        self._reader.finish(self._reader.begin(Span(start, stop, span.segment), as_rows(rows)), start)
        self.on_device.read_again(span, first, rows, self._source)
        self.traffic.bytes_read += rows.nbytes
        self.traffic.bytes_copied += rows.nbytes
        return rows

    def give_up(self, reading: deque[Reading]) -> None:
        """Let reads in flight end before their memory is used again; what they raise no longer matters.

        A read that does not end keeps its slot or buffer, for which there is a new one. What was sent on has arrived.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        for item in reading:
            if item.sending is not None:
                item.sending.stop()
            futures: list[Future[None] | Future[bytes]] = [*item.pieces, *([] if item.units is None else [item.units])]
            running: list[Future[Any]] = [future for future in futures if not future.cancel()]
            if wait(running, max(0.0, deadline - time.monotonic())).not_done:
                self.slots = [_another(slot) if slot is item.slot else slot for slot in self.slots]
                own = None if item.buffer is None else item.buffer[0]
                self.buffers = [_another(buffer) if buffer is own else buffer for buffer in self.buffers]
            if item.sending is not None:
                item.sending.wait()
        reading.clear()

    def _rows_in_memory(self, span: Span) -> Tensor | None:
        """Rows that need not be read: any that lie in memory for a CPU, those in pinned memory for a GPU."""
        there = self._source.view(span.start, span.stop)
        if there is None:
            return None
        rows = as_tensor(there)
        return rows if self._device.type == "cpu" or rows.is_pinned() else None

    def _size(self, span: Span) -> int:
        return span.rows * self._source.shape[1] * self._source.dtype.itemsize

    def _typed(self, memory: Tensor) -> Tensor:
        return typed(memory, self._source)

    def let_go(self) -> None:
        """Hold no memory any more, whoever holds this for its figures; nothing is read from now on."""
        if self._sender is not None:
            self._sender.close()
        self.slots, self.buffers, self._sender = [], [], None
        self.on_host = self.on_host.emptied()
        self.on_device.keep_as(None)


def typed(memory: Tensor, source: Source) -> Tensor:
    """Bytes as rows of the stored type, as many as they are."""
    row_bytes = source.shape[1] * source.dtype.itemsize
    return memory[: len(memory) // row_bytes * row_bytes].view(_dtype(source)).view(-1, source.shape[1])


def _another(memory: Tensor) -> Tensor:
    return torch.empty_like(memory, pin_memory=memory.is_pinned())


def _dtype(source: Source) -> torch.dtype:
    return as_tensor(np.empty(0, source.dtype)).dtype


def _units_of(pieces: Sequence[Future[None]], rows: Rows) -> bytes:
    for piece in pieces:
        piece.result()
    return unit_checksums(rows)
