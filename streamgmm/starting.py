"""What a fit starts from: the course of its passes, and mixtures that are drawn, seeded or grown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np
import torch

from streamgmm.algorithm import course_of
from streamgmm.frame import Frame, frames_of
from streamgmm.job import Job, open_feed
from streamgmm.kernels import Problem
from streamgmm.kernels.tiled import n_row_features
from streamgmm.kmeans_parallel import ROUNDS, Candidates, Stream, candidates
from streamgmm.mixture import Mixture
from streamgmm.passes import Course
from streamgmm.precision import first_precision
from streamgmm.seeding import Sample, centres_among, first_centres, first_mixture
from streamgmm.state import TrainingState
from streamgmm.steps.candidate import Candidate
from streamgmm.steps.growth import SampleEM, first_size, grown
from streamgmm.steps.kmeans import with_centres
from streamgmm.steps.watch import WATCHED_ROWS, Watch
from streamgmm.weighting import Weighting, power_of_two_near


def chosen_course(job: Job, sample: Sample, judged: np.ndarray) -> Course:
    """Which passes are stepwise, from a look at the sample and at the rows ``judged``."""
    trained = len(sample.rows) - int(_watched(job, sample).sum())
    return course_of(job.request, job.source, sample, judged, trained)


def _watched(job: Job, sample: Sample) -> np.ndarray:
    """Which rows of the sample a stepwise run keeps for judging its passes, (n,) bool."""
    n = len(sample.rows)
    chosen = np.random.default_rng([job.request.seed, 3]).permutation(n)[: min(WATCHED_ROWS, n // 8)]
    return np.isin(np.arange(n), chosen)


def watch_of(job: Job, sample: Sample) -> Watch | None:
    """What passes are judged on; None where that would be fewer than two rows."""
    kept = sample.where(_watched(job, sample))
    weights = np.ones(len(kept.rows)) if kept.weights is None else kept.weights
    rows = torch.from_numpy(kept.rows).to(job.device)
    return Watch(rows, torch.from_numpy(weights)) if len(rows) > 1 else None


def drawn_candidates(job: Job, weighting: Weighting, sample: Sample | None) -> Candidates | None:
    """Candidates for seeds from every row, on the leader, whose ``sample`` it is."""
    request = job.request
    precision = "high" if request.precision == "auto" else request.precision
    with open_feed(job) as feed:
        stream = Stream(
            job.source, feed.ring, feed.chunk_rows, weighting, job.device, precision, job.workers, job.world
        )
        return candidates(stream, max(request.sizes), request.seed, sample)


def seeded(
    job: Job, sample: Sample, course: Course, check_rows: torch.Tensor, drawn: Candidates | None
) -> TrainingState:
    """Candidates to start from, size by size."""
    request = job.request
    # For seeding one scale for all features: it measures distances in the data's own proportions.
    frame, seeding_frame = frames_of(sample.rows, request.covariance_type, "spherical")
    rows_read, stepwise = sample.rows_read, course.planned_passes > 0
    if drawn is not None:
        rows_read += (ROUNDS + 1) * job.source.shape[0]
    if stepwise:
        sample = sample.where(~_watched(job, sample))
    first = _first(job, sample, seeding_frame, drawn)
    if stepwise and not request.start.is_given:
        mixtures = [_grown(job, sample, frame, first(first_size(request.sizes[0]), 0), check_rows)]
    else:
        mixtures = [first(k, i) for k in request.sizes for i in range(request.n_init)]
    candidates = tuple(Candidate(mixture, _precision_of(job, mixture.n_components)) for mixture in mixtures)
    return TrainingState(candidates, frame, rows_read=rows_read)


def _precision_of(job: Job, n_components: int) -> str:
    n, d = job.source.shape
    problem = Problem(n_components, d, job.request.covariance_type)
    on_cpu = job.device.type == "cpu"
    return first_precision(job.request.precision, n * n_components * n_row_features(problem) if on_cpu else inf)


def _first(job: Job, sample: Sample, frame: Frame, drawn: Candidates | None) -> Callable[[int, int], Mixture]:
    """The seeded mixture of so many components, for each start."""
    request, rows, weights = job.request, *_on_device(job, sample)

    def first(n_components: int, number: int) -> Mixture:
        seed, start = [request.seed, 1 + number], request.start
        if drawn is not None:
            among, counts = (torch.from_numpy(array).to(job.device) for array in (drawn.rows, drawn.counts))
            start = replace(start, means=centres_among(among, counts, frame, n_components, seed, job.workers))
        if request.hard:
            return with_centres(
                *first_centres(rows, frame, n_components, request.init, start, seed, job.workers, weights)
            )
        return first_mixture(
            rows,
            frame,
            n_components,
            request.covariance_type,
            request.init,
            start,
            request.reg_covar,
            seed,
            job.workers,
            weights,
        )

    return first


def _grown(job: Job, sample: Sample, frame: Frame, first: Mixture, check_rows: torch.Tensor) -> Mixture:
    """``first`` grown on the sample to the size asked for."""
    job.progress.stage("growing")
    if sample.weights is not None:
        sample = replace(sample, weights=sample.weights * power_of_two_near(sample.weights))
    request, rows, weights = job.request, *_on_device(job, sample)
    chunk = job.plan.chunk_rows
    em = SampleEM(rows, weights, check_rows, frame, request.precision, request.reg_covar, chunk, job.workers)
    counts = np.ones(len(rows)) if sample.weights is None else sample.weights
    return grown(first, request.sizes[0], em, sample.rows, counts, [request.seed, 4])


def _on_device(job: Job, sample: Sample) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and weights of the sample."""
    rows = torch.from_numpy(sample.rows).to(job.device)
    return rows, None if sample.weights is None else torch.from_numpy(sample.weights).to(job.device)
