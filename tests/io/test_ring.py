from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.integrity import unit_checksums
from streamgmm.io.plan import plan_chunks
from streamgmm.io.ring import SLOTS, Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.npy import NpySource

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class FakeSource(Source):
    """Row i holds i; counts what is asked of it, fails where it is told to, and can hold readers back."""

    def __init__(self, n: int, fails_at: int | None = None, granule: int = 1) -> None:
        self.name, self.shape, self.dtype, self.read_granule = "fake", (n, 3), np.dtype(np.float32), granule
        self.fails_at, self.reads = fails_at, list[tuple[int, int]]()
        self.gate = threading.Event()
        self.gate.set()

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        self.gate.wait()
        self.reads.append((start, stop))
        if self.fails_at is not None and start <= self.fails_at < stop:
            raise DataError(f"fake: row {self.fails_at} is damaged")
        out[:] = np.arange(start, stop, dtype=np.float32)[:, None]


@pytest.mark.parametrize("device", DEVICES)
@given(
    n=st.integers(1, 200_000), power=st.integers(12, 18), threads=st.sampled_from([1, 2, 4]), repeats=st.integers(1, 2)
)
@settings(max_examples=15, deadline=None)
def test_every_row_arrives_once_and_in_order(device, n, power, threads, repeats):
    spans = plan_chunks(n, 1 << power) * repeats
    with Ring(FakeSource(n), 1 << power, torch.device(device), threads) as ring:
        arrived = [(chunk.span, chunk.rows.clone()) for chunk in ring.stream(spans)]
    assert [span for span, _ in arrived] == spans
    rows = torch.cat([rows for _, rows in arrived]).cpu()
    assert torch.equal(rows[:, 0], torch.arange(n, dtype=torch.float32).repeat(repeats))
    assert ring.traffic.rows == n * repeats
    assert ring.traffic.bytes_read == n * repeats * 12


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_in_a_reader_reaches_its_chunk(device):
    spans = plan_chunks(100_000, 8192)
    arrived = []
    with Ring(FakeSource(100_000, fails_at=50_000), 8192, torch.device(device), 2) as ring:
        stream = ring.stream(spans)
        with pytest.raises(DataError, match="row 50000 is damaged"):
            arrived.extend(chunk.span.stop for chunk in stream)
    assert max(arrived, default=0) <= 49_152


@pytest.mark.parametrize("device", DEVICES)
def test_reading_never_runs_further_ahead_than_there_are_slots(device):
    source = FakeSource(1_000_000)
    with Ring(source, 16_384, torch.device(device), 2) as ring:
        for done, _ in enumerate(ring.stream(plan_chunks(1_000_000, 16_384))):
            started = max(stop for _, stop in source.reads) / 16_384
            # A copied slot is free again, so a device adds its buffers to what may be ahead.
            assert started <= done + 1 + SLOTS + 2 * (device == "cuda")


def test_a_chunk_stays_as_it_is_until_the_next_is_asked_for():
    source = FakeSource(300_000)
    with Ring(source, 65_536, torch.device("cpu"), 4) as ring:
        for chunk in ring.stream(plan_chunks(300_000, 65_536) * 3):
            expected = torch.arange(chunk.span.start, chunk.span.stop, dtype=torch.float32)
            assert torch.equal(chunk.rows[:, 2], expected)


def test_leaving_early_waits_for_reads_in_flight():
    source = FakeSource(500_000)
    with Ring(source, 65_536, torch.device("cpu"), 2) as ring:
        stream = ring.stream(plan_chunks(500_000, 65_536))
        next(stream)
        source.gate.clear()
        releasing = threading.Timer(0.0, source.gate.set)
        releasing.start()
        stream.close()
        releasing.join()
    assert not [t for t in threading.enumerate() if t.name.startswith("streamgmm-read")]


@given(st.integers(1, 100_000), st.sampled_from([1, 1000, 4096, 70_000]), st.sampled_from([1, 3]))
@settings(max_examples=20, deadline=None)
def test_pieces_meet_storage_granules(n, granule, threads):
    source = FakeSource(n, granule=granule)
    with Ring(source, 65_536, torch.device("cpu"), threads) as ring:
        for chunk in ring.stream(plan_chunks(n, 65_536)):
            begins = [start for start, stop in source.reads if chunk.span.start < start < chunk.span.stop]
            assert all(start % granule == 0 for start in begins)


STORED_TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", STORED_TYPES, ids=str)
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_stored_types_cross_unchanged(dtype, in_memory, device, tmp_path):
    x = (torch.randn((1000, 5), generator=torch.Generator().manual_seed(0)) * 20 + 50).to(dtype)
    source = ArraySource(x)
    if not in_memory:
        np.save(tmp_path / "x.npy", as_rows(x))
        source = NpySource(tmp_path / "x.npy")
    with Ring(source, 512, torch.device(device), 1) as ring:
        chunks = [(chunk.rows.clone(), chunk.units) for chunk in ring.stream(plan_chunks(1000, 512), 1000)]
    rows = torch.cat([rows for rows, _ in chunks]).cpu()
    assert rows.dtype == dtype
    assert torch.equal(rows, x)
    assert b"".join(units for _, units in chunks) == unit_checksums(as_rows(x))
    assert ring.traffic.bytes_read == x.nbytes
