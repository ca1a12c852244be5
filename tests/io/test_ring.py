from __future__ import annotations

import threading
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.intake import SLOTS
from streamgmm.io.integrity import unit_checksums
from streamgmm.io.on_device import OnDevice
from streamgmm.io.plan import Span, plan_chunks
from streamgmm.io.residency import Tier
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.npy import NpySource
from streamgmm.io.traffic import Traffic, bottleneck
from tests.fake_gpu import all_is_done, fake_gpu

__all__ = ["fake_gpu"]

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
        chunks = [(chunk.rows.clone(), chunk.units()()) for chunk in ring.stream(plan_chunks(1000, 512), 1000)]
    rows = torch.cat([rows for rows, _ in chunks]).cpu()
    assert rows.dtype == dtype
    assert torch.equal(rows, x)
    assert b"".join(units for _, units in chunks) == unit_checksums(as_rows(x))
    assert ring.traffic.bytes_read == x.nbytes


# Tiers, the page cache, stalls


@given(
    n=st.integers(1, 150_000),
    power=st.integers(12, 17),
    host=st.sampled_from([0, 100_000, 1 << 20, 1 << 30]),
    on_device=st.sampled_from([0, 50_000, 1 << 20, 1 << 30]),
    checked=st.sampled_from([0, 10_000, 300_000]),
    piece=st.sampled_from([1 << 23, 100_000, 7_777]),
    granule=st.sampled_from([1, 1000, 2048]),
    ways=st.fixed_dictionaries({"sends": st.booleans(), "lazy": st.booleans()}),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tiers_of_a_gpu_change_no_row(fake_gpu, monkeypatch, n, power, host, on_device, checked, piece, granule, ways):
    for module in ("reading", "sending"):
        monkeypatch.setattr(f"streamgmm.io.{module}._PIECE_BYTES", piece)
    spans, source = plan_chunks(n, 1 << power), FakeSource(n, granule=granule)
    with Ring(source, 1 << power, torch.device("cpu"), 2) as ring:
        fake_gpu(ring, host, on_device, **ways)
        for turn in range(3):
            stream = ring.stream(spans, checked * (turn != 1))
            arrived = [(c.span, c.rows.clone(), None if c.units is None else c.units()()) for c in stream]
            assert [span for span, _, _ in arrived] == spans
            rows = torch.cat([rows for _, rows, _ in arrived])
            assert torch.equal(rows[:, 0], torch.arange(n, dtype=torch.float32))
            seen = 0
            for span, chunk, units in arrived:
                assert (units is not None) == (turn != 1 and seen < checked)
                assert units is None or units == unit_checksums(as_rows(chunk))
                seen += span.rows
        traffic = ring.traffic
        assert traffic.rows == 3 * n
        assert traffic.bytes_read + traffic.bytes_from_host + traffic.bytes_from_device == 3 * n * 12
        assert traffic.bytes_copied == 3 * n * 12 - traffic.bytes_from_device
        if max(host, on_device) == 1 << 30 and not checked:
            assert traffic.bytes_read == n * 12
            assert len({start for start, _ in source.reads}) == len(source.reads)


class FirstColumn:
    """Keeps a third of each row."""

    key = "first column"

    def size(self, rows: int) -> int:
        return 4 * rows

    def narrow(self, rows: torch.Tensor, place: torch.Tensor) -> None:
        place.view(torch.float32).copy_(rows[:, 0])


@given(
    n=st.integers(1, 150_000),
    power=st.integers(12, 17),
    host=st.sampled_from([0, 100_000, 1 << 30]),
    on_device=st.sampled_from([0, 50_000, 600_000, 1 << 30]),
    checked=st.sampled_from([0, 10_000, 300_000]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_that_stay_narrow(fake_gpu, n, power, host, on_device, checked):
    spans, source = plan_chunks(n, 1 << power), FakeSource(n)
    with Ring(source, 1 << power, torch.device("cpu"), 2) as ring:
        fake_gpu(ring, host, on_device)
        ring.keep_as(FirstColumn())
        expected = torch.arange(n, dtype=torch.float32)
        for turn in range(3):
            for chunk in ring.stream(spans, checked * (turn == 0)):
                own = expected[chunk.span.start : chunk.span.stop]
                if chunk.stored is None:
                    assert torch.equal(chunk.rows, own[:, None].expand(-1, 3))
                else:
                    assert turn > 0
                    assert torch.equal(chunk.rows.view(torch.float32), own)
        traffic = ring.traffic
        assert traffic.bytes_read + traffic.bytes_from_host + traffic.bytes_from_device == 3 * n * 12
        assert traffic.bytes_copied == 3 * n * 12 - traffic.bytes_from_device
        if on_device == 1 << 30:
            assert traffic.bytes_from_device == 2 * n * 12
        # Each place is rounded up to pages.
        assert traffic.bytes_from_device <= 2 * 3 * on_device
        ring.keep_as(None)
        rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(spans)])
        assert torch.equal(rows[:, 1], expected)


def test_narrower_rows_are_more_rows(fake_gpu):
    n, spans = 65_536, plan_chunks(65_536, 4096)
    kept = {}
    for name, narrowing in {"stored": None, "narrow": FirstColumn()}.items():
        with Ring(FakeSource(n), 4096, torch.device("cpu"), 1) as ring:
            fake_gpu(ring, 0, n * 12 // 2)
            ring.keep_as(narrowing)
            for _ in range(2):
                for _ in ring.stream(spans):
                    pass
            kept[name] = ring.traffic.bytes_from_device / (12 * n)
    assert kept == {"stored": 0.5, "narrow": 1.0}


def test_narrow_rows_as_they_are_stored(fake_gpu):
    source, spans = FakeSource(20_000), plan_chunks(20_000, 8192)
    with Ring(source, 8192, torch.device("cpu"), 2) as ring:
        fake_gpu(ring, 0, 1 << 20)
        ring.keep_as(FirstColumn())
        assert ring.narrowing_pays
        for turn in range(3):
            for chunk in ring.stream(spans, 20_000 * (turn == 0)):
                if chunk.stored is not None and chunk.span.start == 8192:
                    rows = chunk.stored(1024, 1536)
                    assert torch.equal(rows[:, 0], torch.arange(9216, 9728, dtype=torch.float32))
        assert ring.traffic.bytes_read == 12 * (20_000 + 2 * 512)
        assert ring.narrowing_pays
        for chunk in ring.stream(spans):
            chunk.stored(0, chunk.span.rows)
        assert not ring.narrowing_pays
        # What was checked is checked again.
        source.read_into = lambda start, stop, out: out.fill(-1.0)
        chunk = next(ring.stream(spans))
        with pytest.raises(DataError, match="between row 1024 of fake and row 2047 of fake"):
            chunk.stored(1024, 2048)


def test_no_memory_for_narrow_rows_is_no_failure(fake_gpu):
    class Hungry(FirstColumn):
        def narrow(self, rows, place):
            raise torch.OutOfMemoryError

    n, spans = 20_000, plan_chunks(20_000, 8192)
    with Ring(FakeSource(n), 8192, torch.device("cpu"), 2) as ring:
        fake_gpu(ring, 0, 1 << 20)
        ring.keep_as(Hungry())
        rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(spans * 2)])
    assert torch.equal(rows[:, 2], torch.arange(n, dtype=torch.float32).repeat(2))


def test_what_was_not_read_into_its_place_is_not_taken_from_there(fake_gpu):
    """A place in host memory whose reading was given up, and rows that then went another way."""
    n, spans = 16_384, plan_chunks(16_384, 4096)
    with Ring(FakeSource(n), 4096, torch.device("cpu"), 1) as ring:
        fake_gpu(ring, 1 << 20, 0)
        for span in spans:
            ring._intake.on_host.place(span, span.rows * 12).fill_(7)
        ring._intake.on_device = OnDevice(Tier(1 << 20, lambda size: torch.empty(size, dtype=torch.uint8), exact=True))
        ring.keep_as(FirstColumn())
        for _ in ring.stream(spans):
            pass
        ring._intake.on_device = OnDevice(Tier(0, lambda size: torch.empty(size, dtype=torch.uint8), exact=True))
        ring.keep_as(None)
        rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(spans)])
    assert torch.equal(rows[:, 1], torch.arange(n, dtype=torch.float32))


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize("tier", [0, 1 << 20])
def test_leaving_a_gpu_stream_early_and_beginning_again(fake_gpu, tier, sends):
    source = FakeSource(200_000)
    spans = plan_chunks(200_000, 16_384)
    with Ring(source, 16_384, torch.device("cpu"), 2) as ring:
        fake_gpu(ring, tier, tier, sends=sends)
        for leave in (1, 3, 7, 0):
            stream = ring.stream(spans)
            for _ in range(leave):
                next(stream)
            stream.close()
            assert all_is_done() or leave == 0
        rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(spans)])
    assert torch.equal(rows[:, 1], torch.arange(200_000, dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("host", [None, 0, 1 << 20, 1 << 30])
@pytest.mark.parametrize("on_device", [0, 1 << 21, 1 << 30])
def test_tiers_on_a_gpu(tmp_path, host, on_device):
    x = np.random.default_rng(0).random((300_000, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    spans = plan_chunks(len(x), 16_384)
    with Ring(
        NpySource(tmp_path / "x.npy"), 16_384, torch.device("cuda"), 3, host_memory=host, device_memory=on_device
    ) as ring:
        for _ in range(3):
            rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(spans)])
            assert np.array_equal(rows.cpu().numpy(), x)
        traffic = ring.traffic
    assert traffic.bytes_read + traffic.bytes_from_host + traffic.bytes_from_device == 3 * x.nbytes
    assert traffic.bytes_copied == 3 * x.nbytes - traffic.bytes_from_device
    # What is sent on is not timed: copies of many threads share the link.
    all_sent = host is None or min(host, on_device) >= x.nbytes
    assert (traffic.seconds_copying == 0) == all_sent
    assert (traffic.bytes_from_device > 0) == (on_device > 0)


@pytest.mark.gpu
def test_pinned_memory_is_copied_from_where_it_lies():
    x = torch.rand((200_000, 8)).pin_memory()
    with Ring(ArraySource(x), 16_384, torch.device("cuda"), 1) as ring:
        rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(plan_chunks(len(x), 16_384))])
        assert torch.equal(rows.cpu(), x)
        assert ring.traffic.seconds_reading == 0


def test_decoded_rows_stay_in_host_memory_as_far_as_they_fit():
    source = FakeSource(300_000)
    source.read_path = "decode"
    spans = plan_chunks(300_000, 16_384)
    slots = SLOTS * 16_384 * 12
    with Ring(source, 16_384, torch.device("cpu"), 2, host_memory=slots + (1 << 21)) as ring:
        for _ in range(3):
            rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(spans)])
            assert torch.equal(rows[:, 0], torch.arange(300_000, dtype=torch.float32))
        traffic = ring.traffic
    assert traffic.bytes_from_host + traffic.bytes_read == 3 * 300_000 * 12
    # Ten chunks of 196,608 bytes fit in 2 MiB, and the short last one, in each of two passes.
    kept = 10 * 196_608 + (300_000 - 18 * 16_384) * 12
    assert traffic.bytes_from_host == 2 * kept
    assert traffic.bytes_decoded == traffic.bytes_read
    assert traffic.hit_rates["host"] == pytest.approx(2 * kept / (3 * 300_000 * 12))


class StoredSource(FakeSource):
    """As if its rows lay in files; notes what is read past the page cache."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.read_path, self.uncached = "extents", list[int]()

    @property
    def stored_bytes(self) -> int:
        return self.shape[0] * 12

    def read_uncached(self, start: int, stop: int, out: np.ndarray) -> str | None:
        self.uncached.append(start)
        self.read_into(start, stop, out)
        return "fake: O_DIRECT is refused"


@pytest.mark.parametrize(("budget", "cached"), [(None, 100_000), (1_200_000, 100_000), (600_000, 50_000), (0, 0)])
def test_a_first_part_stays_in_the_page_cache(budget, cached):
    source, told = StoredSource(100_000), []
    with Ring(source, 4096, torch.device("cpu"), 2, host_memory=budget, notify=told.append) as ring:
        for _ in range(2):
            rows = torch.cat([chunk.rows.clone() for chunk in ring.stream(plan_chunks(100_000, 4096))])
            assert torch.equal(rows[:, 0], torch.arange(100_000, dtype=torch.float32))
    plain = cached // 4096 * 4096 if cached < 65_536 else 100_000
    assert sorted(source.uncached) == sorted([start for start in range(plain, 100_000, 4096) if start < 65_536] * 2 + [
        start for start in range(65_536, 100_000, 4096) if start >= plain] * 2)  # fmt: skip
    assert told == (["fake: O_DIRECT is refused"] if cached < 100_000 else [])


def test_a_stalled_read_says_so_and_goes_on():
    source, told = FakeSource(100_000), []
    source.gate.clear()

    def notify(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            source.gate.set()

    with Ring(source, 65_536, torch.device("cpu"), 2, notify=notify, stall_seconds=0.01) as ring:
        chunks = sum(1 for _ in ring.stream(plan_chunks(100_000, 65_536)))
    assert chunks == 2
    assert len(told) >= 2
    assert "row 0 of fake and those after it: no read has finished" in told[0]


def test_a_read_that_never_returns_holds_up_nobody(monkeypatch):
    """Neither the end of the stream, nor that of the ring, nor another stream over other slots."""
    for module in ("ring", "intake"):
        monkeypatch.setattr(f"streamgmm.io.{module}.PATIENCE_SECONDS", 0.05)
    source, told = FakeSource(500_000), []

    def give_up(text: str) -> None:
        told.append(text)
        raise RuntimeError("enough")

    ring = Ring(source, 65_536, torch.device("cpu"), 2, notify=give_up, stall_seconds=0.01)
    source.gate.clear()
    stuck = ring._intake._free_slot(deque())
    with pytest.raises(RuntimeError, match="enough"):
        next(ring.stream(plan_chunks(500_000, 65_536)))
    assert len(ring._intake.slots) == SLOTS
    assert not any(slot is stuck for slot in ring._intake.slots)
    with pytest.raises(RuntimeError, match="enough"):
        ring.close()
    assert "left behind" in told[-1]
    source.gate.set()
    for thread in ring._reader._readers._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_spans_are_asked_for_as_it_goes():
    """One stream over several passes reads on across their ends."""
    asked: list[Span] = []

    def passes():
        for _ in range(3):
            for span in plan_chunks(100_000, 65_536):
                asked.append(span)
                yield span

    with Ring(FakeSource(100_000), 65_536, torch.device("cpu"), 2) as ring:
        for done, _ in enumerate(ring.stream(passes()), 1):
            assert len(asked) <= done + SLOTS
        assert done == 6


def test_traffic_of_a_pass(tmp_path):
    x = np.random.default_rng(0).random((100_000, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    with Ring(NpySource(tmp_path / "x.npy"), 8192, torch.device("cpu"), 2, host_memory=0) as ring:
        rows = np.concatenate([chunk.rows.numpy().copy() for chunk in ring.stream(plan_chunks(100_000, 8192))])
        assert np.array_equal(rows, x)
        assert ring.traffic.seconds_reading > 0
        assert ring.traffic.bytes_decoded == 0
        assert sum(ring.traffic.hit_rates.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        (Traffic(), "kernel"),
        (Traffic(seconds_waiting=0.9), "kernel"),
        (Traffic(seconds_waiting=2, bytes_read=10), "disk"),
        (Traffic(seconds_waiting=2, bytes_read=10, bytes_decoded=10, seconds_reading=4, seconds_decoding=3), "decode"),
        (Traffic(seconds_waiting=2, bytes_read=10, bytes_decoded=10, seconds_reading=4, seconds_decoding=1), "disk"),
        (Traffic(seconds_waiting=2, bytes_read=10, bytes_decoded=3, seconds_reading=4, seconds_decoding=4), "disk"),
        (Traffic(seconds_waiting=2, bytes_read=10, seconds_reading=4, seconds_sending=3), "link"),
        (Traffic(seconds_waiting=2, bytes_read=10, seconds_reading=4, seconds_sending=1), "disk"),
        (Traffic(seconds_copying=9), "link"),
        (Traffic(seconds_copying=7), "kernel"),
    ],
)
def test_the_bottleneck_is_named(traffic, expected):
    assert bottleneck(traffic, 10.0) == expected


@pytest.mark.parametrize("exact", [False, True])
def test_tiers_keep_to_their_budget(exact):
    taken: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        taken.append(size)
        return torch.empty(size, dtype=torch.uint8)

    spans = plan_chunks(1_000_000, 65_536)
    for budget in (0, 4095, 4096, 100_000, 1 << 20, 3_333_333):
        taken.clear()
        tier = Tier(budget, allocate, exact=exact)
        places = [tier.place(span, 100_000) for span in spans]
        assert sum(taken) <= budget
        kept = [place for place in places if place is not None]
        assert kept == places[: len(kept)]
        assert [tier.place(span, 100_000) is not None for span in spans] == [place is not None for place in places]
        assert len(kept) >= min(len(spans), sum(taken) // 102_400 - len(taken))

    def fail(size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    assert Tier(1 << 30, fail).place(spans[0], 1000) is None


def test_what_a_long_chunk_leaves_of_a_block_holds_a_shorter_one(monkeypatch):
    monkeypatch.setattr("streamgmm.io.residency._EXACT_BLOCK_BYTES", 10 * 4096)
    tier = Tier(100 * 4096, lambda size: torch.empty(size, dtype=torch.uint8), exact=True)
    sizes = [7 * 4096, 3 * 4096] * 11
    kept = [tier.place(span, size) is not None for span, size in zip(plan_chunks(22, 1), sizes, strict=True)]
    assert kept == [True] * 20 + [False] * 2


# Rows that are sent on


def sent_to_gpu(source: Source, threads: int, fake_gpu) -> Ring:
    return fake_gpu(Ring(source, 65_536, torch.device("cpu"), threads, stall_seconds=0.01))


def test_what_is_sent_on_needs_no_slot(fake_gpu):
    with sent_to_gpu(FakeSource(300_000), 2, fake_gpu) as ring:
        for chunk in ring.stream(plan_chunks(300_000, 65_536) * 2):
            assert torch.equal(chunk.rows[:, 1], torch.arange(chunk.span.start, chunk.span.stop, dtype=torch.float32))
        assert ring._intake.slots == []
        assert ring.traffic.bytes_copied == ring.traffic.bytes_read == 2 * 300_000 * 12
        sender = ring._intake._sender
        assert sender._memory
    assert sender._memory == []


def test_an_error_while_sending_reaches_its_chunk(fake_gpu):
    arrived = []
    with sent_to_gpu(FakeSource(300_000, fails_at=200_000), 2, fake_gpu) as ring:
        stream = ring.stream(plan_chunks(300_000, 65_536))
        with pytest.raises(DataError, match="row 200000 is damaged"):
            arrived.extend(chunk.span.stop for chunk in stream)
        assert max(arrived) <= 196_608
        # What failed once may be asked for again: buffers are free.
        ring._intake._source.fails_at = None
        assert sum(chunk.span.rows for chunk in ring.stream(plan_chunks(300_000, 65_536))) == 300_000


def test_a_sender_that_hangs_keeps_its_buffer_to_itself(fake_gpu, monkeypatch):
    monkeypatch.setattr("streamgmm.io.intake.PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("streamgmm.io.sending._PIECE_BYTES", 1200)
    source = FakeSource(300_000)
    ring = sent_to_gpu(source, 4, fake_gpu)

    def give_up(text: str) -> None:
        raise RuntimeError("enough")

    ring._reader._notify = give_up
    held = list(ring._intake.buffers)
    source.gate.clear()
    with pytest.raises(RuntimeError, match="enough"):
        next(ring.stream(plan_chunks(300_000, 65_536)))
    assert ring._intake.buffers[0] is not held[0]  # all threads are at the first span
    for buffer in ring._intake.buffers:
        buffer.fill_(-1.0)
    source.gate.set()
    ring.close()
    assert all((buffer == -1.0).all() for buffer in ring._intake.buffers)
    assert len(source.reads) <= 4  # no thread began another piece
