"""Feeding the rows of a step: what shrinks where device memory runs out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamgmm.feed import Feed
from streamgmm.io.plan import cut_spans, segment_spans
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource


def test_each_shrinking_halves_the_chunks_and_what_stays_on_the_device():
    source = ArraySource(np.zeros((8_000_000, 1), np.float32))
    spans, opened = segment_spans(source.shape[0]), list[tuple[int, float]]()

    def open_ring(rows: int, kept: float) -> Ring:
        opened.append((rows, kept))
        return Ring(source, rows, torch.device("cpu"), 1)

    with Feed(open_ring, 65_536, 16_384) as feed:
        feed.begin(spans, [(spans, spans)], 0)
        fed = [feed.shrink(spans[0].segment) for _ in range(3)]
        assert sum(chunk.span.rows for chunk in feed) == source.shape[0]
    assert fed == [True, True, False]
    assert opened == [(65_536, 1.0), (32_768, 0.5), (16_384, 0.25)]


class Form:
    """A form of rows to keep, told from others by its key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def size(self, rows: int) -> int:
        return rows

    def narrow(self, rows: torch.Tensor, place: torch.Tensor) -> None: ...


class TellingRing(Ring):
    """Notes in which forms rows were to be kept."""

    asked: list[str | None]
    pays = True

    def keep_as(self, narrowing: Form | None) -> None:
        self.asked.append(narrowing and narrowing.key)
        super().keep_as(narrowing)

    @property
    def narrowing_pays(self) -> bool:
        return self.pays


@pytest.mark.parametrize("remedy", ["another form", "no form", "too many read again"])
def test_rows_stay_as_stored_once_their_form_changed(remedy):
    x = np.arange(300_000, dtype=np.float32)[:, None]
    source = ArraySource(x)
    spans, rings = segment_spans(source.shape[0]), list[TellingRing]()

    def open_ring(rows: int, kept: float) -> Ring:
        ring = TellingRing(source, rows, torch.device("cpu"), 1)
        ring.asked = []
        rings.append(ring)
        return ring

    def step_of(feed: Feed) -> list[float]:
        return torch.cat([chunk.rows[:, 0].clone() for chunk in feed]).tolist()

    with Feed(open_ring, 65_536, 16_384) as feed:
        feed.begin(spans, [(spans, spans)] * 6, 0)
        for _ in range(2):
            feed.keep_as(Form("a"))
            assert step_of(feed) == x[:, 0].tolist()
            feed.next_step()
        assert rings[-1].asked == ["a"]
        assert feed.shrink(spans[0].segment)
        assert rings[-1].asked == ["a"]
        assert step_of(feed) == x[:, 0].tolist()
        feed.next_step()
        rings[-1].pays = remedy != "too many read again"
        feed.keep_as({"another form": Form("b"), "no form": None}.get(remedy, Form("a")))
        assert rings[-1].asked == ["a", None]
        assert step_of(feed) == x[:, 0].tolist()
        feed.next_step()
        rings[-1].pays = True
        feed.keep_as(Form("a"))
        assert step_of(feed) == x[:, 0].tolist()
        assert rings[-1].asked == ["a", None]


def test_whoever_takes_the_ring_finds_rows_as_stored():
    source = ArraySource(np.arange(300_000, dtype=np.float32)[:, None])
    spans = segment_spans(source.shape[0])

    def open_ring(rows: int, kept: float) -> Ring:
        ring = TellingRing(source, rows, torch.device("cpu"), 1)
        ring.asked = []
        return ring

    with Feed(open_ring, 65_536, 16_384) as feed:
        feed.begin(spans, [(spans, spans)] * 3, 0)
        feed.keep_as(Form("a"))
        for _ in feed:
            pass
        ring = feed.end()
        assert ring.asked == ["a", None]
        assert sum(chunk.span.rows for chunk in ring.stream(spans)) == source.shape[0]


def test_what_is_streamed_after_the_end_has_the_slots_for_itself():
    source = ArraySource(np.arange(200_000, dtype=np.float32)[:, None])
    spans = segment_spans(source.shape[0])

    def open_ring(rows: int, kept: float) -> Ring:
        return Ring(source, rows, torch.device("cpu"), 2)

    with Feed(open_ring, 16_384, 16_384) as feed:
        feed.begin(spans, [(spans, spans)] * 2, 0)
        next(iter(feed))
        chunks = feed.end().stream(cut_spans(spans, 16_384))
        rows = torch.cat([chunk.rows.clone() for chunk in chunks])
        assert list(feed) == []
    assert torch.equal(rows[:, 0], torch.arange(200_000, dtype=torch.float32))


@pytest.mark.parametrize("most", [1, 3, 64])
def test_what_is_left_may_be_others_of_a_step_than_what_was_owned(most):
    """As after a process was killed: those that go on share what is left, and the next step as ever."""
    source = ArraySource(np.arange(4_000_000, dtype=np.float32)[:, None])
    spans = segment_spans(source.shape[0])
    own, left = spans[:30], [replace(spans[40], start=spans[40].start + 16_384), *spans[41:50]]

    def rows_of(feed: Feed) -> list[int]:
        return torch.cat([chunk.rows[:, 0].clone() for chunk in feed]).long().tolist()

    with Feed(lambda rows, kept: Ring(source, rows, torch.device("cpu"), 1), 1 << 18, 16_384, most) as feed:
        feed.begin(left, [(spans, own)] * 2, 0)
        ends = {chunk.stop for chunk in feed.chunks(spans, spans)}
        assert {chunk.stop for chunk in feed.chunks(spans, left)} <= ends | {left[-1].stop}
        assert rows_of(feed) == [row for span in left for row in range(span.start, span.stop)]
        feed.next_step()
        assert rows_of(feed) == list(range(own[-1].stop))


def test_memory_that_runs_out_in_what_another_process_had_begun():
    source = ArraySource(np.arange(4_000_000, dtype=np.float32)[:, None])
    spans = segment_spans(source.shape[0])
    left = spans[40:44]
    with Feed(lambda rows, kept: Ring(source, rows, torch.device("cpu"), 1), 1 << 16, 16_384) as feed:
        feed.begin(left, [(spans, spans[:30])], 0)
        next(iter(feed))
        assert feed.shrink(left[0].segment)
        assert sum(chunk.span.rows for chunk in feed) == sum(span.rows for span in left)
