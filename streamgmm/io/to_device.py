"""The way to a GPU: filled slots are copied, spans are sent on, under the kernel that works at the chunk before.

A copy stream moves a filled slot into one of two device buffers while the kernel reads the other; what is sent on goes
there in the streams of the threads that read it. The kernel's stream waits for these copies. A buffer is overwritten
only after the event that it recorded behind its last use; a slot is refilled only after the event of the copy that
emptied it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.intake import DEVICE_BUFFERS, Ahead, Buffer, Chunk, Intake, Reading
from streamgmm.io.integrity import unit_checksums
from streamgmm.io.plan import Span


@dataclass(frozen=True, eq=False)
class _Copying:
    item: Reading
    begun: torch.cuda.Event
    copied: torch.cuda.Event

    def seconds(self) -> float:
        """On the device's clock; the copy has ended."""
        milliseconds: float = self.begun.elapsed_time(self.copied)
        return milliseconds / 1e3


@dataclass(frozen=True, eq=False)
class _Staged:
    """Rows on the device, or on their way until all of ``copied``."""

    item: Reading
    rows: Tensor
    buffer: Buffer | None
    copied: Sequence[torch.cuda.Event]


class ToDevice:
    """One stream of spans to a device."""

    def __init__(self, spans: Ahead, intake: Intake, device: torch.device) -> None:
        self._spans, self._intake = spans, intake
        self._compute, self._copy = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        # Memory that the allocator gave out may still be read by a kernel for which it was freed.
        given = torch.cuda.Event()
        given.record(self._compute)
        self._copy.wait_event(given)
        self._buffers = deque((buffer, given) for buffer in intake.buffers)
        self._free, self._reading = deque(intake.slots), deque[Reading]()
        self._copying, self._staged = deque[_Copying](), deque[_Staged]()

    def chunks(self) -> Generator[Chunk]:
        """As `Ring.stream`."""
        try:
            while True:
                self._reclaim(wait=not self._reading and not self._intake.has_slot(self._free))
                self._intake.ahead(self._spans, self._reading, self._free, self._buffers)
                while self._may_stage():
                    self._stage()
                if not self._staged:
                    return
                yield from self._handed_out(self._staged.popleft())
        finally:
            copying, staged = ([each.item for each in items] for items in (self._copying, self._staged))
            self._intake.give_up(deque([*copying, *staged, *self._reading]))
            self._copy.synchronize()
            self._intake.traffic.seconds_copying += sum(done.seconds() for done in self._copying)

    def _reclaim(self, *, wait: bool) -> None:
        """Free the slots that were copied; ``wait`` for the first."""
        while self._copying and (wait or self._copying[0].copied.query()):
            done = self._copying.popleft()
            done.copied.synchronize()
            self._intake.traffic.seconds_copying += done.seconds()
            if done.item.slot is not None:
                self._free.append(done.item.slot)
            wait = False

    def _may_stage(self) -> bool:
        """Ready data is copied under the running kernel; data still being read is not waited for."""
        if not self._reading or len(self._staged) >= DEVICE_BUFFERS:
            return False
        item = self._reading[0]
        return (bool(self._buffers) or not item.needs_buffer) and (not self._staged or item.done())

    def _stage(self) -> None:
        """Wait for what is read next, and begin to copy it where it is not on the device yet."""
        item = self._reading[0]
        self._intake.finish(item)
        self._reading.popleft()
        if not item.resident:
            self._intake.traffic.bytes_copied += item.rows.nbytes
        if item.place is not None:
            self._intake.on_device.hold(item.span)
        if item.resident or item.sending is not None:
            arrived = [] if item.sending is None else item.sending.arrived()
            self._staged.append(_Staged(item, item.rows, item.buffer, arrived))
            return
        buffer = self._buffers.popleft() if item.needs_buffer else None
        rows = item.place if buffer is None else buffer[0][: item.span.rows]
        assert rows is not None
        with torch.cuda.stream(self._copy):
            if buffer is not None:
                self._copy.wait_event(buffer[1])
            begun, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record(self._copy)
            rows.copy_(item.rows, non_blocking=True)
            copied.record(self._copy)
        self._copying.append(_Copying(item, begun, copied))
        self._staged.append(_Staged(item, rows, buffer, [copied]))

    def _handed_out(self, staged: _Staged) -> Generator[Chunk]:
        """The chunk; and behind its use what becomes of it."""
        item, narrowing = staged.item, self._intake.on_device.narrowing
        for copied in staged.copied:
            self._compute.wait_event(copied)
        stored, units = None, partial(_units_on_device, staged.rows) if item.checked else None
        if item.resident and narrowing is not None:
            self._intake.on_device.handed_out(item.span)
            stored = partial(self._read_again, item.span)
        yield Chunk(item.span, staged.rows, units, stored)
        if item.narrow is not None:
            self._intake.on_device.narrow(item.span, staged.rows, item.narrow, units)
        if staged.buffer is not None:
            released = torch.cuda.Event()
            released.record(self._compute)
            self._buffers.append((staged.buffer[0], released))

    def _read_again(self, span: Span, first: int, last: int) -> Tensor:
        return self._intake.read_again(span, first, last).to(self._intake.buffers[0].device)


def _units_on_device(rows: Tensor) -> Callable[[], bytes]:
    if not rows.is_cuda:
        return partial(unit_checksums, as_rows(rows))
    from streamgmm.io.device_checksums import device_unit_checksums  # Triton, which only a GPU needs

    return device_unit_checksums(rows)
