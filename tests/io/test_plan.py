from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import DataError
from streamgmm.io.plan import (
    Extent,
    chunks_left,
    cut_spans,
    parts_of,
    plan_chunks,
    read_extent,
    round_chunk_rows,
    segment_spans,
)
from streamgmm.statistics import BLOCK_ROWS, segment_bounds

BLOCKS = st.integers(1, 40).map(lambda blocks: blocks * BLOCK_ROWS)
SIZES = st.one_of(st.integers(0, 16).map(lambda power: 1 << power), BLOCKS)
LONG_SIZES = st.one_of(st.integers(12, 16).map(lambda power: 1 << power), BLOCKS)


@given(st.integers(1, 3_000_000), st.integers(8, 30), st.data())
def test_chunks_cover_every_row_once_and_never_cross_a_segment(n, power, data):
    rows = min(1 << power, 40 * BLOCK_ROWS)
    whole = plan_chunks(n, rows)
    start = data.draw(st.sampled_from([0, *(span.stop for span in whole[:-1])]))
    spans = plan_chunks(n, rows, start)
    assert [span.start for span in spans] == [start, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == n
    bounds = segment_bounds(n)
    for span in spans:
        first, last = bounds[span.segment]
        assert first <= span.start < span.stop <= last
        assert span.rows <= rows


@given(st.integers(1, 6_000_000), LONG_SIZES, st.integers(1, 64))
def test_a_chunk_is_shared_by_whole_spans_that_fit(n, rows, most):
    spans = segment_spans(n)
    chunks = cut_spans(spans, rows, most)
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == n
    for chunk in chunks:
        own = parts_of(chunk, spans)
        assert chunk.rows <= rows
        assert chunk.segment == own[0].segment
        assert len(own) <= most
        assert len(own) == 1 or set(own) <= set(spans)
    for one, next_one in pairwise(chunks):
        own = [*parts_of(one, spans), *parts_of(next_one, spans)]
        assert len(own) > most or not set(own) <= set(spans) or next_one.stop - one.start > rows


@given(st.integers(1, 6_000_000), LONG_SIZES, st.integers(1, 64), st.data())
def test_what_is_left_keeps_the_ends_of_its_chunks(n, rows, most, data):
    spans = segment_spans(n)
    chunks = cut_spans(spans, rows, most)
    assert chunks_left(chunks, spans) == chunks
    left = data.draw(st.sets(st.sampled_from(spans)).map(lambda some: sorted(some, key=lambda span: span.start)))
    if left:
        left[0] = replace(left[0], start=data.draw(st.integers(left[0].start, left[0].stop - 1)))
    parts = chunks_left(chunks, left)
    assert [row for part in parts for row in (part.start, part.stop)] == sorted(
        row for part in parts for row in (part.start, part.stop)
    )
    assert sum(part.rows for part in parts) == sum(span.rows for span in left)
    for part in parts:
        chunk = chunks[bisect_right(chunks, part.start, key=lambda chunk: chunk.start) - 1]
        assert part.stop <= chunk.stop
        own = parts_of(part, left)
        assert sum(each.rows for each in own) == part.rows
        assert part.segment == own[0].segment
        # A part ends where its chunk does, or what is left.
        assert part.stop == chunk.stop or all(span.start != part.stop for span in left)


def test_other_chunks_are_refused():
    with pytest.raises(ValueError, match="65536"):
        plan_chunks(10, 1000)


@given(st.integers(1, 10**7), st.integers(0, 12))
def test_rounding_gives_a_permitted_chunk(rows, power):
    granule = 1 << power
    rounded = round_chunk_rows(rows, granule)
    assert rounded % granule == 0
    assert BLOCK_ROWS % rounded == 0 or rounded % BLOCK_ROWS == 0
    assert rounded <= max(rows, granule)


def test_read_extent_continues_short_reads(tmp_path, monkeypatch):
    path = tmp_path / "file"
    content = np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    out = np.zeros(500, np.uint8)
    read_extent(Extent(str(path), descriptor, 100, 500), out)
    assert np.array_equal(out, content[100:600])
    with pytest.raises(DataError, match=r"ends at byte 1000, 100 bytes too early"):
        read_extent(Extent(str(path), descriptor, 600, 500), out)
    os.close(descriptor)
    with pytest.raises(DataError, match="read failed at byte 0"):
        read_extent(Extent(str(path), descriptor, 0, 10), out[:10])
