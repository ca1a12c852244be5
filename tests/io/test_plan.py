from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent, plan_chunks, read_extent, round_chunk_rows
from streamgmm.statistics import BLOCK_ROWS, segment_bounds

SIZES = st.one_of(
    st.integers(0, 16).map(lambda power: 1 << power), st.integers(1, 40).map(lambda blocks: blocks * BLOCK_ROWS)
)


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
