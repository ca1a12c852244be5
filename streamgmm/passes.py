"""How a run goes over the data: which rows are summed before which update.

A pass is a sequence of *steps*, each followed by one update; a step is at most 64 runs of rows, the leaves of its
summation tree. Full-batch EM has one step a pass, of the 64 segments. A stepwise pass has fifty, made of *regions*,
which divide every segment evenly. All of it follows from the number of rows and a `Course`: never from how much is read
at once, by whom, or how often the run was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from streamgmm.io.plan import Span, segment_spans
from streamgmm.statistics import SEGMENTS, segment_bounds

STEPS = 50
"""Updates in a stepwise pass; twice as many gained nothing."""

STEPWISE_PASSES = 3
"""Before the full-batch ones."""

REGION_UNIT = 256
"""A region is a whole number of so many rows, what a checksum is taken of."""

Step = tuple[Span, ...]
"""Spans numbered by the leaf of the tree that they are; in that order."""


@dataclass(frozen=True)
class Course:
    """Stepwise passes, if any, and then as many full-batch ones as it takes.

    Attributes
    ----------
    stepwise_passes : int
        None of them: full-batch EM.
    planned_passes : int
        So many stepwise passes the window grows over; fewer are made where one of them was undone.
    first_window : float
        Rows that the first update averages over; see `steps.stepwise`.
    steps : int
        Of a stepwise pass, at most `STEPS`.
    region_rows : int
        Rows of a region, a multiple of `REGION_UNIT`; 0 where regions are the segments.
    shuffled : bool
        Whether a step has regions from all over the data instead of neighbours.
    seed : int
        Of their order.
    why : str
        In a line, for people.
    """

    stepwise_passes: int = 0
    planned_passes: int = 0
    first_window: float = 1.0
    steps: int = STEPS
    region_rows: int = 0
    shuffled: bool = False
    seed: int = 0
    why: str = ""

    @property
    def algorithm(self) -> str:
        """``stepwise`` where the run began so."""
        return "stepwise" if self.planned_passes else "em"

    def is_stepwise(self, number: int) -> bool:
        """Whether pass ``number``, from 0, updates within."""
        return number < self.stepwise_passes


def regions(course: Course, n_samples: int) -> tuple[tuple[int, int], ...]:
    """Half-open row ranges in order that together are all rows; none crosses a segment. Some segments are empty."""
    return _regions(course.region_rows, n_samples)


def steps_of(course: Course, n_samples: int, number: int) -> tuple[Step, ...]:
    """The steps of pass ``number``, from 0."""
    if not course.is_stepwise(number):
        return _full_batch(n_samples)
    return _steps(course, n_samples, number if course.shuffled else 0)


def rows_before(course: Course, n_samples: int, number: int, step: int) -> int:
    """Rows of the steps before ``step`` in pass ``number``."""
    ends = _ends(course, n_samples, number)
    return ends[min(step, len(ends) - 1)]


def region_rows(n_samples: int, unit: int, least: int) -> int:
    """The smallest multiple of ``unit`` rows, at least ``least``, whose regions fit the leaves of `STEPS` steps."""
    sizes = [last - first for first, last in segment_bounds(n_samples)]
    rows = -(-max(least, n_samples // (STEPS * SEGMENTS)) // unit) * unit
    while sum(-(-size // rows) for size in sizes) > STEPS * SEGMENTS:
        rows += unit
    return rows


def stratified_order(count: int, steps: int, seed: int, number: int) -> list[np.ndarray]:
    """``count`` things dealt to ``steps`` steps: of every run of ``steps`` neighbours each step has one.

    Which one, a permutation of the run says that follows from ``seed`` and pass ``number`` alone. Whatever lies
    together in a file for longer than a run is then in every step in proportion.
    """
    rng = np.random.default_rng([seed, number])
    padded = np.full(-(-count // steps) * steps, -1)
    padded[:count] = np.arange(count)
    strata = rng.permuted(padded.reshape(-1, steps), axis=1)
    return [np.sort(step[step >= 0]) for step in strata.T if (step >= 0).any()]


@lru_cache(maxsize=8)
def _regions(rows: int, n_samples: int) -> tuple[tuple[int, int], ...]:
    bounds = segment_bounds(n_samples)
    if not rows:
        return tuple(bounds)
    return tuple((row, min(row + rows, last)) for first, last in bounds for row in range(first, last, rows))


@lru_cache(maxsize=8)
def _full_batch(n_samples: int) -> tuple[Step, ...]:
    return (tuple(segment_spans(n_samples)),)


@lru_cache(maxsize=8)
def _steps(course: Course, n_samples: int, number: int) -> tuple[Step, ...]:
    parts = _regions(course.region_rows, n_samples)
    count = min(course.steps, len(parts))
    if course.shuffled:
        order = stratified_order(len(parts), count, course.seed, number)
    else:
        order = np.array_split(range(len(parts)), count)
    return tuple(
        tuple(Span(parts[region][0], parts[region][1], leaf) for leaf, region in enumerate(step)) for step in order
    )


@lru_cache(maxsize=8)
def _ends(course: Course, n_samples: int, number: int) -> tuple[int, ...]:
    rows = [sum(span.rows for span in step) for step in steps_of(course, n_samples, number)]
    return (0, *np.cumsum(rows).tolist())
