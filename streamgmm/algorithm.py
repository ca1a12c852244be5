"""Which way over the data: full-batch EM, or stepwise EM and in which order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamgmm.exchangeability import design_effect, limit, runs
from streamgmm.io.sources.base import Source
from streamgmm.mixture import n_parameters
from streamgmm.passes import REGION_UNIT, STEPS, STEPWISE_PASSES, Course, region_rows, regions
from streamgmm.request import FitRequest, not_stepwise
from streamgmm.seeding import Sample, sample_size

FEWEST_STEP_ROWS = 1024
"""Below which ``auto`` does not divide a pass: so few rows are read in no time."""

_LARGEST_SAMPLE_BYTES = 256 << 20

_REGION_ROWS = 1024
"""At least, where regions are neighbours: several processes can then share a step, and kernels have whole tiles."""

_FEWEST_REGIONS = 16
"""A shuffled step of fewer is not the whole in small: of 4 it lost likelihood on sorted data, of 16 it gained."""

_WINDOW_REGIONS = 128
"""Of sorted data a region is hardly more than one independent row: averages over 20 of them did harm, over 80 none."""

_FEWEST_STEPS = 10
"""Where fewer shuffled steps make a pass, full-batch EM is not much slower."""

_WINDOW_ROWS_A_PARAMETER = 1
"""Averages over fewer than 0.6 forget more than they learn; of 2 they learn too little where K is large."""

_FEWEST_ROWS_A_PARAMETER = 2
"""With fewer, ``auto`` leaves no row out of an update."""


def sampled_rows(request: FitRequest, source: Source) -> int:
    """Rows of the sample that pass 0 draws: those asked for, or else `sample_size`.

    Where a mixture may be grown on them it is a row a parameter, if that is more and no more than a tenth of the data
    and 256 MiB of float32: with a third of a row a parameter, growing fits the sample and not the data.
    """
    n, d = source.shape
    if request.sample_rows is not None:
        return min(n, request.sample_rows)
    usual = sample_size(n, d, max(request.sizes))
    if request.algorithm == "em" or (request.algorithm == "auto" and _why_not(request, source)):
        return usual
    free = n_parameters(request.covariance_type, request.sizes[0], d)
    return max(usual, min(free, n // 10, _LARGEST_SAMPLE_BYTES // (4 * d)))


def rows_to_judge_order(request: FitRequest, source: Source) -> NDArray[np.int64]:
    """Rows, besides the sample, that `course_of` looks at; none where the answer is known without."""
    if request.algorithm == "em" or (request.algorithm == "auto" and _why_not(request, source)):
        return np.empty(0, dtype=np.int64)
    return runs(*source.shape, np.random.default_rng([request.seed, 2]))


def course_of(request: FitRequest, source: Source, sample: Sample, judged: NDArray[np.int64], trained: int) -> Course:
    """The way that a request takes over the data.

    Parameters
    ----------
    sample : Sample
        With the rows at ``judged``, those of `rows_to_judge_order`, beside it.
    trained : int
        Rows of the sample that the first mixture will be made from.
    """
    if request.algorithm == "em":
        return Course()
    if request.algorithm == "auto" and (reason := _why_not(request, source)):
        return Course(why=f"full-batch EM: {reason}")
    n, d = source.shape
    effect = max(design_effect(sample.rows, sample.indices, n), design_effect(sample.beside, judged, n))
    known, exchangeable = f"design effect {effect:.2f}, limit {limit(d):.2f}", effect <= limit(d)
    rows, steps = _regions_and_steps(source, shuffled=not exchangeable)
    if not steps:
        advice = "streamgmm prepare --shuffle would make it fit for stepwise EM"
        return Course(why=f"full-batch EM: the rows lie in an order that matters ({known}); {advice}")
    order = "the rows lie in no particular order" if exchangeable else "the rows' order matters, so it is shuffled"
    window = _WINDOW_ROWS_A_PARAMETER * n_parameters(request.covariance_type, request.sizes[0], d)
    if not exchangeable:
        window = max(window, _WINDOW_REGIONS * rows)
    passes = stepwise_passes(request)
    return Course(
        stepwise_passes=passes,
        planned_passes=passes,
        first_window=float(min(n, max(trained, window))),
        steps=steps,
        region_rows=rows,
        shuffled=not exchangeable,
        seed=request.seed,
        why=f"stepwise EM: {order} ({known})",
    )


def stepwise_passes(request: FitRequest) -> int:
    """Three, or as many fewer as leave one of those allowed to pass 0 and one to full-batch EM; at least one."""
    limits = [STEPWISE_PASSES, request.max_iter - 1]
    if request.max_passes < STEPWISE_PASSES + 2:
        limits.append(int(request.max_passes) - 2)
    return max(1, min(limits))


def _why_not(request: FitRequest, source: Source) -> str:
    """Why ``auto`` needs no look at the data to choose full-batch EM; empty where it does."""
    n, d = source.shape
    if obstacle := not_stepwise(request):
        return f"stepwise EM {obstacle.split(';')[0]}"
    if n < STEPS * FEWEST_STEP_ROWS:
        return f"{n} rows are too few to divide a pass over them, {STEPS * FEWEST_STEP_ROWS} would do"
    free = n_parameters(request.covariance_type, request.sizes[0], d)
    if n <= _FEWEST_ROWS_A_PARAMETER * free:
        return f"{n} rows for {free} parameters: every update needs all of them"
    return ""


def _regions_and_steps(source: Source, *, shuffled: bool) -> tuple[int, int]:
    """Rows of a region, and steps of a pass: as many as there are enough regions for; 0 where that is too few."""
    n = source.shape[0]
    if not shuffled:
        return region_rows(n, REGION_UNIT, _REGION_ROWS), STEPS
    # Regions in any order are read as they are stored, or every chunk of storage would be read many times.
    unit = -(-source.read_granule // REGION_UNIT) * REGION_UNIT
    rows = region_rows(n, unit, unit)
    steps = min(STEPS, len(regions(Course(region_rows=rows), n)) // _FEWEST_REGIONS)
    return rows, steps if steps >= _FEWEST_STEPS else 0
