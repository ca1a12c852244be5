"""A ring's way to a GPU on the CPU: the order of buffers, slots and tiers, if not of streams."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from streamgmm.io.on_device import OnDevice
from streamgmm.io.residency import Tier
from streamgmm.io.ring import Ring
from streamgmm.io.sending import Sender
from streamgmm.io.sending import sends as can_send


class FakeEvent:
    """Ends as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: object) -> float:
        return 1.0


class FakeStream:
    def __init__(self, device: object = None) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def fake_gpu(monkeypatch):
    """Makes a ring that was made for the CPU believe in a GPU, with so many bytes of both tiers."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def pageable(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def disguise(ring: Ring, host: int = 0, device: int = 0, *, sends: bool = True) -> Ring:
        intake = ring._intake
        ring._device = intake._device = SimpleNamespace(type="cuda")
        intake.buffers = [intake._typed(intake._allocate()) for _ in range(2)]
        intake.on_host = Tier(host, pageable)
        intake.on_device = OnDevice(Tier(device, pageable, exact=True))
        if sends and can_send(intake._source):
            intake._sender = Sender(intake._source, len(intake.buffers[0]), ring._device, pageable)
        return ring

    return disguise
