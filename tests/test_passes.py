"""Which rows are summed before which update: every row once a pass, in steps that a tree can sum."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.passes import (
    REGION_UNIT,
    STEPS,
    Course,
    region_rows,
    regions,
    rows_before,
    steps_of,
    stratified_order,
)
from streamgmm.statistics import SEGMENTS, segment_bounds


def course(n: int, unit: int, shuffled: bool) -> Course:
    return Course(3, 3, region_rows=region_rows(n, unit, unit), shuffled=shuffled, seed=5)


@given(st.integers(1, 30_000_000), st.sampled_from([256, 1024, 8192]))
@settings(max_examples=60, deadline=None)
def test_regions_divide_segments(n, unit):
    parts = regions(course(n, unit, False), n)
    assert parts[0][0] == 0
    assert parts[-1][1] == n
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    assert len(parts) <= STEPS * SEGMENTS
    assert {last for _, last in segment_bounds(n)} <= {0} | {last for _, last in parts}
    assert all(first % REGION_UNIT == 0 for first, _ in parts)


@given(st.integers(1, 5_000_000), st.booleans(), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_every_row_is_in_one_step_of_a_pass(n, shuffled, number):
    way = course(n, REGION_UNIT, shuffled)
    steps = steps_of(way, n, number)
    spans = sorted((span.start, span.stop) for step in steps for span in step)
    assert spans == list(regions(way, n))
    for step in steps:
        assert [span.segment for span in step] == list(range(len(step)))
        assert 0 < len(step) <= SEGMENTS
    assert rows_before(way, n, number, 0) == 0
    assert rows_before(way, n, number, len(steps)) == n


def test_after_the_stepwise_passes_come_full_ones():
    way = Course(2, 3, region_rows=1024)
    counts = [len(steps_of(way, 1_000_000, number)) for number in range(5)]
    assert counts == [50, 50, 1, 1, 1]
    assert steps_of(way, 1_000_000, 2) == steps_of(Course(), 1_000_000, 0)


@pytest.mark.parametrize(("n", "unit", "rows"), [(200_000, 256, 256), (200_000, 1024, 1024), (10**9, 256, 313_344)])
def test_regions_are_as_small_as_a_pass_of_fifty_steps_allows(n, unit, rows):
    assert region_rows(n, unit, unit) == rows


def test_a_stratified_order_takes_from_everywhere_and_changes_from_pass_to_pass():
    steps = stratified_order(1000, 50, seed=0, number=0)
    for step in steps:
        assert np.array_equal(step // 50, np.arange(20))
    assert not np.array_equal(steps[0], stratified_order(1000, 50, seed=0, number=1)[0])
    assert not np.array_equal(steps[0], stratified_order(1000, 50, seed=1, number=0)[0])
