"""A ring's way to a GPU on the CPU: the order of buffers, slots and tiers, if not of streams."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from streamgmm.io.on_device import OnDevice
from streamgmm.io.residency import Tier
from streamgmm.io.ring import Ring


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

    def disguise(ring: Ring, host: int = 0, device: int = 0) -> Ring:
        ring._device = SimpleNamespace(type="cuda")
        ring._buffers = [torch.empty_like(ring._slots[0]) for _ in range(2)]
        ring._on_host = Tier(host, lambda size: torch.empty(size, dtype=torch.uint8))
        ring._on_device = OnDevice(Tier(device, lambda size: torch.empty(size, dtype=torch.uint8), exact=True))
        return ring

    return disguise
