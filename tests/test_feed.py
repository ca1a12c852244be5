"""Feeding the rows of a step: what shrinks where device memory runs out."""

from __future__ import annotations

import numpy as np
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
        feed.begin(spans, [spans], 0)
        fed = [feed.shrink(spans[0].segment) for _ in range(3)]
        assert sum(chunk.span.rows for chunk in feed) == source.shape[0]
    assert fed == [True, True, False]
    assert opened == [(65_536, 1.0), (32_768, 0.5), (16_384, 0.25)]


def test_what_is_streamed_after_the_end_has_the_slots_for_itself():
    source = ArraySource(np.arange(200_000, dtype=np.float32)[:, None])
    spans = segment_spans(source.shape[0])

    def open_ring(rows: int, kept: float) -> Ring:
        return Ring(source, rows, torch.device("cpu"), 2)

    with Feed(open_ring, 16_384, 16_384) as feed:
        feed.begin(spans, [spans, spans], 0)
        next(iter(feed))
        chunks = feed.end().stream(cut_spans(spans, 16_384))
        rows = torch.cat([chunk.rows.clone() for chunk in chunks])
        assert list(feed) == []
    assert torch.equal(rows[:, 0], torch.arange(200_000, dtype=torch.float32))
