"""A ring's way to a GPU on the CPU: the order of buffers, slots, tiers and streams.

Copies of other streams than the kernels' happen at once, or as late as they may: when somebody waits for them, from
what then lies where they copy from. Whoever forgets to wait finds other rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, local
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from streamgmm.io.on_device import OnDevice
from streamgmm.io.residency import Tier
from streamgmm.io.ring import Ring
from streamgmm.io.sending import Sender
from streamgmm.io.sending import sends as can_send

COPY = torch.Tensor.copy_


class FakeStream:
    """Work in order; ``lazy`` work is done when it is waited for."""

    lazy = False
    lock = RLock()
    made: ClassVar[list[FakeStream]] = []

    def __init__(self, device: object = None) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0
        self.made.append(self)

    def add(self, work: Callable[[], object]) -> None:
        with self.lock:
            self.work.append(work)
            if not self.lazy:
                self.run(len(self.work))

    def run(self, until: int) -> None:
        with self.lock:
            while self.done < until:
                self.work[self.done]()
                self.done += 1  # and not before: another thread may ask

    def wait_event(self, event: FakeEvent) -> None:
        self.add(event.synchronize)

    def synchronize(self) -> None:
        self.run(len(self.work))


class KernelStream(FakeStream):
    """Nothing in it is late: rows are looked at as soon as they are handed out."""

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.stream, self.after = FakeStream(), 0

    def record(self, stream: FakeStream | None = None) -> None:
        self.stream = stream or CURRENT.stream
        self.after = len(self.stream.work)

    def query(self) -> bool:
        return self.stream.done >= self.after

    def synchronize(self) -> None:
        self.stream.run(self.after)

    def elapsed_time(self, other: object) -> float:
        return 1.0


CURRENT = local()


@contextmanager
def in_stream(stream: FakeStream) -> Iterator[None]:
    CURRENT.stream = stream
    try:
        yield
    finally:
        del CURRENT.stream


def all_is_done() -> bool:
    """Whether no stream has work left."""
    return all(stream.done == len(stream.work) for stream in FakeStream.made)


def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if non_blocking:
        CURRENT.stream.add(lambda: COPY(target, source))
        return target
    return COPY(target, source)


def begin_copy(target: int, source: int, size: int, stream: FakeStream) -> None:
    assert stream is CURRENT.stream
    stream.add(lambda: ctypes.memmove(target, source, size))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Makes a ring that was made for the CPU believe in a GPU, with so many bytes of both tiers."""
    FakeStream.made.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: KernelStream())
    monkeypatch.setattr(torch.cuda, "stream", in_stream)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr("streamgmm.io.sending.begin_copy", begin_copy)

    def pageable(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def disguise(ring: Ring, host: int = 0, device: int = 0, *, sends: bool = True, lazy: bool = True) -> Ring:
        monkeypatch.setattr(FakeStream, "lazy", lazy)
        intake = ring._intake
        ring._device = intake._device = SimpleNamespace(type="cuda")
        intake.buffers = [intake._typed(intake._allocate()) for _ in range(2)]
        intake.on_host = Tier(host, pageable)
        intake.on_device = OnDevice(Tier(device, pageable, exact=True))
        if sends and can_send(intake._source):
            intake._sender = Sender(intake._source, len(intake.buffers[0]), ring._device, pageable)
        return ring

    return disguise
