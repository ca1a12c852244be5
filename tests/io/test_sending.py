from __future__ import annotations

from concurrent.futures import Future
from itertools import chain
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgmm.errors import DataError
from streamgmm.io.driver import begin_copy
from streamgmm.io.sending import Sender, Sending, sends
from tests.fake_gpu import FakeStream, all_is_done, fake_gpu
from tests.io.test_ring import FakeSource

__all__ = ["fake_gpu"]

ROWS = 1000


def pageable(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def sender_of(source: FakeSource, monkeypatch, piece_rows: int) -> Sender:
    monkeypatch.setattr("streamgmm.io.sending._PIECE_BYTES", piece_rows * 12)
    return Sender(source, ROWS, torch.device("cpu"), pageable)


@given(piece_rows=st.integers(1, 64), granule=st.integers(1, 32), bounds=st.tuples(*[st.integers(0, ROWS)] * 2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_are_all_rows_and_end_with_what_storage_reads_at_once(piece_rows, granule, bounds, monkeypatch):
    start, stop = sorted(bounds)
    pieces = sender_of(FakeSource(ROWS, granule=granule), monkeypatch, piece_rows).pieces(start, stop)
    assert list(chain.from_iterable(range(*piece) for piece in pieces)) == list(range(start, stop))
    assert all(end - begin <= max(piece_rows, granule) for begin, end in pieces)
    assert all(end % granule == 0 for _, end in pieces[:-1])


@given(
    threads=st.integers(1, 4), piece_rows=st.integers(1, 300), spans=st.integers(1, 3), lazy=st.booleans(), at=st.data()
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_threads_share_the_pieces_of_a_span(threads, piece_rows, spans, lazy, at, fake_gpu, monkeypatch):
    monkeypatch.setattr(FakeStream, "lazy", lazy)
    sender = sender_of(FakeSource(ROWS), monkeypatch, piece_rows)
    starts = at.draw(st.lists(st.integers(0, ROWS - 1), min_size=spans, max_size=spans))
    # Not at the beginning of its memory, as a place in a tier.
    places = [torch.zeros(ROWS + 7, 3)[7 : 7 + ROWS - start] for start in starts]
    pieces = [iter(sender.pieces(start, ROWS)) for start in starts]
    sent = list[int]()

    def work() -> None:
        for start, place, own in zip(starts, places, pieces, strict=True):
            arrived, nbytes, waited = sender.send(None, own, start, place)
            arrived.synchronize()
            sent.append(nbytes)
            assert waited >= 0

    workers = [Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(sent) == sum(12 * (ROWS - start) for start in starts)
    for start, place in zip(starts, places, strict=True):
        assert torch.equal(place[:, 0], torch.arange(start, ROWS, dtype=torch.float32))


def test_a_place_in_use_is_not_written(fake_gpu, monkeypatch):
    monkeypatch.setattr(FakeStream, "lazy", True)
    sender, place, seen = sender_of(FakeSource(ROWS), monkeypatch, 100), torch.zeros(ROWS, 3), list[torch.Tensor]()
    kernels, used = FakeStream(), torch.cuda.Event()
    kernels.add(lambda: seen.append(place.clone()))
    used.record(kernels)
    sender.send(used, iter(sender.pieces(0, ROWS)), 0, place)[0].synchronize()
    assert not seen[0].any()
    assert place[1:].all()


def test_a_thread_that_is_stopped_ends_with_its_piece(fake_gpu, monkeypatch):
    source = FakeSource(ROWS)
    sender = sender_of(source, monkeypatch, 10)
    source.gate.clear()
    taken, pieces, place = Event(), iter(sender.pieces(0, ROWS)), torch.zeros(ROWS, 3)

    def telling():
        for piece in pieces:
            taken.set()
            yield piece

    worker = Thread(target=sender.send, args=(None, telling(), 0, place))
    worker.start()
    taken.wait()
    Sending(pieces, []).stop()
    source.gate.set()
    worker.join()
    assert source.reads == [(0, 10)]


def test_what_threads_sent_is_waited_for_where_they_did_not_fail(fake_gpu, monkeypatch):
    monkeypatch.setattr(FakeStream, "lazy", True)
    sender, place = sender_of(FakeSource(ROWS), monkeypatch, 100), torch.zeros(ROWS, 3)
    arrived, failed, cancelled, running = (Future() for _ in range(4))
    arrived.set_result(sender.send(None, iter(sender.pieces(0, 150)), 0, place)[0])
    failed.set_exception(DataError("damaged"))
    cancelled.cancel()
    assert not place.any()
    sending = Sending(iter([]), [arrived, failed, cancelled, running])
    sending.wait()
    assert torch.equal(place[:150, 0], torch.arange(150, dtype=torch.float32))
    with pytest.raises(DataError, match="damaged"):
        sending.arrived()


def test_a_closed_sender_has_nothing_on_its_way(fake_gpu, monkeypatch):
    monkeypatch.setattr(FakeStream, "lazy", True)
    sender, place = sender_of(FakeSource(ROWS), monkeypatch, 100), torch.zeros(ROWS, 3)
    sender.send(None, iter(sender.pieces(0, 150)), 0, place)
    assert not all_is_done()
    sender.close()
    assert all_is_done()


def test_an_error_leaves_nothing_on_its_way(fake_gpu, monkeypatch):
    monkeypatch.setattr(FakeStream, "lazy", True)
    sender, place = sender_of(FakeSource(ROWS, fails_at=500), monkeypatch, 100), torch.zeros(ROWS, 3)
    with pytest.raises(DataError, match="row 500 is damaged"):
        sender.send(None, iter(sender.pieces(0, ROWS)), 0, place)
    assert all_is_done()


@pytest.mark.parametrize(
    ("granule", "path", "sent"), [(1, "extents", True), (1 << 22, "decode", False), (1, "objects", False)]
)
def test_what_is_sent_on(granule, path, sent):
    source = FakeSource(10, granule=granule)
    source.read_path = path
    assert sends(source) == sent


def test_the_driver_says_what_it_refuses(monkeypatch):
    monkeypatch.setattr("streamgmm.io.driver._copy", lambda: lambda *arguments: 700)
    with pytest.raises(RuntimeError, match=r"copying 12 bytes to the device failed: the CUDA driver gives error 700"):
        begin_copy(0, 0, 12, SimpleNamespace(cuda_stream=0))


@pytest.mark.gpu
def test_a_copy_by_address_is_in_its_streams_order():
    memory = torch.arange(1 << 22, dtype=torch.int32).pin_memory()
    there, stream = torch.zeros_like(memory, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        begin_copy(there.data_ptr() + 4, memory.data_ptr(), memory.nbytes - 8, stream)
        doubled = there * 2
    stream.synchronize()
    expected = torch.cat([torch.zeros(1, dtype=torch.int32), memory[:-2], torch.zeros(1, dtype=torch.int32)])
    assert np.array_equal(doubled.cpu().numpy(), 2 * expected.numpy())
