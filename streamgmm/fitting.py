"""One fit from source to result: plan, sample, seed or resume, train, save."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamgmm.algorithm import course_of, rows_to_judge_order, sampled_rows
from streamgmm.checkpoint import History
from streamgmm.consistency import check_fits
from streamgmm.device import compute_workers, resolve_device
from streamgmm.distributed import ALONE, Message, World
from streamgmm.errors import DamagedFileError, DataError, RunError
from streamgmm.estep import bind
from streamgmm.evaluation import Evaluation, evaluate
from streamgmm.exchangeability import run_bytes
from streamgmm.feed import Feed
from streamgmm.frame import Frame, frames_of
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.io.traffic import bottleneck
from streamgmm.kernels import Problem
from streamgmm.kernels.tiled import n_row_features
from streamgmm.kmeans_parallel import ROUNDS, Candidates, Stream, candidates, n_candidates
from streamgmm.memory import MemoryPlan, Wishes, plan_fit
from streamgmm.mixture import Mixture
from streamgmm.parallel import one_thread
from streamgmm.passes import Course
from streamgmm.precision import check_sample, choose_precision, first_precision
from streamgmm.recorder import Progress, Recorder
from streamgmm.request import FitRequest, identity_of, not_stepwise, validate
from streamgmm.result import FitResult, FittedModel, best_model
from streamgmm.run import RunFolder
from streamgmm.seeding import Sample, centres_among, draw_sample, first_centres, first_mixture
from streamgmm.sharing import spread
from streamgmm.state import TrainingState, best_of
from streamgmm.steps.candidate import Candidate, Step
from streamgmm.steps.collapse import repair_policy
from streamgmm.steps.em import EMStep
from streamgmm.steps.gain import split_bytes
from streamgmm.steps.growth import SampleEM, first_size, grown
from streamgmm.steps.kmeans import KMeansStep, with_centres
from streamgmm.steps.squarem import MIXTURES_BEHIND, Squarem
from streamgmm.steps.stepwise import Schedule, StepwiseStep
from streamgmm.steps.watch import Watch
from streamgmm.training import Lead, Training, TrainingSettings, train
from streamgmm.transforms import Transformation
from streamgmm.weighting import Weighting, power_of_two_near

_POOL_ROWS = 8192
_POOL_BYTES = 16 << 20

WATCHED_ROWS = 4096
"""Rows of the sample on which the passes of a stepwise run are judged."""


def fit(
    source: Source,
    request: FitRequest,
    output: Path | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
    world: World = ALONE,
) -> FitResult:
    """Fit a mixture to every row of ``source``.

    With ``output``, a RUN folder, an unfinished run there is resumed and the result is left there; ``fresh`` moves
    what is there aside and starts over. Where ``world`` has other processes, this is the leader, and they `assist`.

    Raises
    ------
    RequestError, DataError, RunError
        The request cannot be met; nothing was overwritten.
    NumericalError
        No finite result.
    Interrupted
        ``progress.stop_requested`` named a signal; a checkpoint was written first.
    PeerLost
        Another process is gone; what it had summed since the last checkpoint is lost.
    """
    job = _job(source, request, progress, world)
    if output is None:
        return _fit(job, None)
    run = RunFolder(output, fresh=fresh)
    try:
        run.begin(identity_of(request, source, job.device))
        result = _finished(run, request)
        if result is not None:
            world.broadcast(_NOTHING_TO_DO)
            return result
        run.commit()
        result = _fit(job, run)
        _save(run, result, request.sizes, source.transformation)
        return result
    finally:
        run.close()


@one_thread()
def assist(source: Source, request: FitRequest, progress: Progress | None = None, *, world: World) -> None:
    """What every other process of ``world`` does while the leader fits: read its share, and do as it is told.

    Raises as `fit`, or Reported where the leader does.
    """
    job = _job(source, request, progress, world)
    job.progress.stage("waiting")
    told = world.broadcast(None)
    if told.facts == _NOTHING_TO_DO.facts:
        return
    # How often to go on is the leader's to say.
    weighting = replace(_weighting(request), scale=float(told.facts["scale"]))
    if told.facts["draws"]:
        _drawn(job, weighting, None)
    settings = _settings(job, weighting, "em")
    with _feed(job) as feed:
        recorder = Recorder(
            source.shape[0], feed.ring, None, job.progress, float("inf"), History(), time.perf_counter()
        )
        job.progress.stage("training")
        train(None, Training(source, settings, job.device, recorder, world), feed)
        if len(request.sizes) > 1 or request.holdout:
            job.progress.stage("evaluating")
            _evaluations(job, None, settings, feed)
        _usage(job, feed, 0.0)


_NOTHING_TO_DO = Message({"finished": True})


@dataclass(frozen=True, eq=False)
class _Job:
    """A request that was found possible, and what it will use."""

    source: Source
    request: FitRequest
    device: torch.device
    workers: int
    plan: MemoryPlan
    progress: Progress
    world: World


def _job(source: Source, request: FitRequest, progress: Progress | None, world: World) -> _Job:
    """Raises as `fit`, also where another process sees other data."""
    validate(request, source)
    device = resolve_device(request.device, world.local_rank)
    workers = compute_workers(device, world.local_size)
    job = _Job(source, request, device, workers, _plan(source, request, device, workers), progress or Progress(), world)
    fingerprints = [message.facts["data"] for message in world.gather(Message({"data": source.fingerprint}))]
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != source.fingerprint:
            raise DataError(f"{source.name}: process {rank} sees other data under this name; show all of them the same")
    return job


def _plan(source: Source, request: FitRequest, device: torch.device, workers: int) -> MemoryPlan:
    def problems(sizes: Iterable[int]) -> list[Problem]:
        return [Problem(k, source.shape[1], request.covariance_type) for k in sizes]

    trained = request.sizes if request.split_to is None else (request.split_to,)
    sampled = sampled_rows(request, source)
    smaller = (*request.sizes, *((1,) if request.collapse == "drop" else ()))
    wishes = Wishes(request.memory_limit, request.chunk_rows, request.threads, workers)
    pool = _pool_rows(source, request)
    candidates = problems(trained * request.n_init)
    growth = 0
    if request.algorithm != "em" and not not_stepwise(request):
        smaller, pool = (*smaller, first_size(request.sizes[0])), pool + WATCHED_ROWS
        growth = run_bytes(source) + split_bytes(sampled, source.shape[1], workers)
    return plan_fit(
        source,
        candidates,
        device,
        wishes,
        smaller=problems(smaller),
        hard=request.hard,
        pool=pool,
        growth=growth,
        drawn=Problem(n_candidates(max(request.sizes)), source.shape[1], "spherical") if request.draws_seeds else None,
        behind=MIXTURES_BEHIND if request.accelerate == "squarem" else 0,
        sampled=sampled,
    )


def _pool_rows(source: Source, request: FitRequest) -> int:
    """Rows that empty components may restart from."""
    return min(_POOL_ROWS, max(1, _POOL_BYTES // (8 * source.shape[1]))) if request.collapse == "reseed" else 0


@one_thread()
def _fit(job: _Job, run: RunFolder | None) -> FitResult:
    """Seed or resume, train, and describe the best candidate of each size."""
    source, request, device, progress = job.source, job.request, job.device, job.progress
    n_samples, n_features = source.shape
    begun = time.perf_counter()
    loaded = run.latest(device, progress.warn) if run else None
    if loaded is not None:
        _check_fits(loaded[0], source)
    progress.stage("sampling")
    weighting = _weighting(request)
    judged = rows_to_judge_order(request, source) if loaded is None else np.empty(0, dtype=np.int64)
    size = sampled_rows(request, source)
    sample = draw_sample(source, max(request.sizes), request.seed, weighting, judged, size)
    if sample.weights is not None:
        weighting = replace(weighting, scale=power_of_two_near(sample.weights))
    check_rows = check_sample(torch.from_numpy(sample.rows), device)
    pool = sample.rows[: _pool_rows(source, request)].copy()
    course = _course(job, sample, judged) if loaded is None else loaded[0].course
    sample = replace(sample, beside=sample.beside[:0])  # all that is held from here on was asked for
    if course.why:
        progress.note(course.why)
    draws = loaded is None and request.draws_seeds
    job.world.broadcast(Message({"scale": weighting.scale, "draws": draws}))
    if loaded is None:
        progress.stage("seeding")
        drawn = _drawn(job, weighting, sample) if draws else None
        state, history = replace(_seeded(job, sample, course, check_rows, drawn), course=course), History()
    else:
        state, history, _ = loaded
    watch = _watch(job, sample) if course.planned_passes else None
    del sample
    settings = _settings(job, weighting, course.algorithm)
    with _feed(job) as feed:
        recorder = Recorder(n_samples, feed.ring, run, progress, request.checkpoint_every, history, begun)
        progress.stage("training")
        streaming = time.perf_counter()
        lead = Lead(_step(request, pool, state), check_rows, _stepwise_step(request, course, n_samples), watch)
        state = train(state, Training(source, settings, device, recorder, job.world, lead), feed)
        recorder.save(state)
        models = _models(state, request, weighting.scale)
        rows_read = state.rows_read
        if len(models) > 1 or request.holdout:
            progress.stage("evaluating")
            models = _evaluated(job, models, state, settings, check_rows, feed)
            rows_read += n_samples
        usage = _usage(job, feed, streaming)
    return FitResult(
        models=models,
        best=best_model(models, request.chosen_by),
        all_converged=not state.active,
        n_samples=n_samples,
        n_passes=rows_read / n_samples,
        seconds=time.perf_counter() - begun,
        bytes_read=rows_read * n_features * source.dtype.itemsize,
        resumed=loaded is not None,
        skipped=state.skipped,
        history=recorder.history,
        plan=job.plan,
        algorithm=course.algorithm,
        why=course.why,
        **usage,
    )


def _check_fits(state: TrainingState, source: Source) -> None:
    try:
        check_fits(state, source.shape[0])
    except ValueError as error:
        raise DamagedFileError(f"{source.name}: the checkpoint is not of these rows ({error}); use --fresh") from None


def _weighting(request: FitRequest) -> Weighting:
    """What a request says of weights; their scale is known after sampling."""
    return Weighting(request.weights, request.holdout, request.seed, request.nonfinite == "skip")


def _settings(job: _Job, weighting: Weighting, algorithm: str) -> TrainingSettings:
    request = job.request
    return TrainingSettings(
        weighting, request.iterations(algorithm), request.max_passes, request.precision, job.workers, request.hard
    )


def _feed(job: _Job) -> Feed:
    plan, request = job.plan, job.request
    host = None if request.host_memory is None else request.host_memory // job.world.local_size
    # What the plan leaves of the limit keeps the first chunks; without one, half of what is free.
    spare = _free_bytes(job.device) // 2 if plan.limit is None else plan.limit - plan.needed

    def open_ring(rows: int, kept: float) -> Ring:
        return Ring(
            job.source,
            rows,
            job.device,
            plan.threads,
            host_memory=host,
            device_memory=int(kept * spare),
            recheck=request.recheck,
            notify=job.progress.warn,
        )

    return Feed(open_ring, plan.chunk_rows, plan.granule)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _usage(job: _Job, feed: Feed, begun: float) -> dict[str, Any]:
    """What the processes took, on the leader: bytes added up; waiting, and memory, of the one that has most.

    The bottleneck since ``begun``, and where rows came from, are the leader's own.
    """
    device, traffic = job.device, feed.ring.traffic
    own = {
        "bytes_streamed": traffic.bytes_read,
        "bytes_copied": traffic.bytes_copied,
        "seconds_waiting": traffic.seconds_waiting,
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }
    all_of_them = [message.facts for message in job.world.gather(Message(own))]
    if not all_of_them:
        return {}
    return {
        **{name: (sum if name.startswith("bytes") else max)(each[name] for each in all_of_them) for name in own},
        "bottleneck": bottleneck(traffic, time.perf_counter() - begun),
        "hit_rates": traffic.hit_rates,
    }


def peak_host_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step(request: FitRequest, pool: np.ndarray, state: TrainingState) -> Step:
    repair = repair_policy(request.collapse, torch.from_numpy(pool), state.frame)
    if request.hard:
        return KMeansStep(request.tol, repair)
    step = EMStep(request.tol, request.reg_covar, repair, request.split_to or 0)
    return Squarem(step) if request.accelerate == "squarem" else step


def _stepwise_step(request: FitRequest, course: Course, n_samples: int) -> StepwiseStep | None:
    if not course.planned_passes:
        return None
    span = float(course.planned_passes * n_samples)
    return StepwiseStep(Schedule(course.first_window, float(n_samples), span), request.reg_covar)


def _models(state: TrainingState, request: FitRequest, scale: float) -> tuple[FittedModel, ...]:
    """The best start of each size; the candidates lie size by size."""
    starts = range(0, len(state.candidates), request.n_init)
    found = (best_of(state.candidates[first : first + request.n_init]) for first in starts)
    return tuple(FittedModel(c.result, c.lower_bounds, c.converged, c.n_rows / scale, hard=request.hard) for c in found)


def _evaluated(
    job: _Job,
    models: tuple[FittedModel, ...],
    state: TrainingState,
    settings: TrainingSettings,
    check_rows: torch.Tensor,
    feed: Feed,
) -> tuple[FittedModel, ...]:
    """The models with their likelihoods at the final parameters, from one more pass."""
    frame, workers, hard = state.frame, job.workers, job.request.hard

    def candidate(mixture: Mixture) -> Candidate:
        precision = job.request.precision
        if precision == "auto":
            precision = choose_precision(mixture, frame, first_precision(precision), check_rows, workers, hard)
        return Candidate(mixture, precision)

    final = TrainingState(tuple(candidate(model.mixture) for model in models), frame)
    scale = settings.weighting.scale
    return tuple(
        replace(model, evaluation=replace(evaluation, n_rows=evaluation.n_rows / scale))
        for model, evaluation in zip(models, _evaluations(job, final, settings, feed), strict=True)
    )


def _evaluations(job: _Job, final: TrainingState | None, settings: TrainingSettings, feed: Feed) -> list[Evaluation]:
    """Of the candidates of ``final``, which the leader brings; the others get nothing."""
    shared = spread(final, job.world, job.device)
    assert shared is not None
    bound = [
        bind(candidate.mixture, shared.frame, candidate.precision, job.device, job.workers, job.request.hard)
        for candidate in shared.candidates
    ]
    return evaluate(job.source.shape[0], bound, settings.weighting, feed.ring, feed.chunk_rows, job.world)


def _save(run: RunFolder, result: FitResult, sizes: tuple[int, ...], transformation: Transformation | None) -> None:
    """Every model, the best one last: its file says that the run is finished."""
    if len(sizes) > 1:
        for size, model in zip(sizes, result.models, strict=True):
            run.save_model(size, model.mixture, {**model.summary(), **model.details()}, transformation)
    facts = {**result.facts(), "all_converged": result.all_converged}
    details = {**facts, **result.model.summary(), **result.model.details(), "sizes": list(sizes)}
    run.finish(result.mixture, details, transformation)


def _finished(run: RunFolder, request: FitRequest) -> FitResult | None:
    """The result of a run that has nothing left to do under ``request``."""
    found = run.result()
    if found is None:
        return None
    mixture, metadata = found
    facts = metadata.get("result")
    if not isinstance(facts, dict) or "all_converged" not in facts:
        raise RunError(f"{run.path}: holds a model that no fit wrote; name another --output")
    several = facts["sizes"] if len(facts.get("sizes", ())) > 1 else ()
    models = tuple(FittedModel.from_details(*run.load_model(size)) for size in several)
    models = models or (FittedModel.from_details(mixture, facts),)
    n_passes, n_iter = float(facts["n_passes"]), max(model.n_iter for model in models)
    algorithm = str(facts.get("algorithm", "em"))
    if n_iter > request.max_iter:
        raise RunError(
            f"{run.path}: has run {n_iter} iterations already, more than max_iter={request.max_iter}; "
            f"ask for {n_iter} or more, or name another --output"
        )
    more = n_iter < request.iterations(algorithm) and n_passes + 1 <= request.max_passes
    if not facts["all_converged"] and more:
        return None
    kept = (
        "n_samples",
        "n_passes",
        "seconds",
        "seconds_waiting",
        "bytes_read",
        "bytes_streamed",
        "bytes_copied",
        "skipped",
    )
    return FitResult(
        models=models,
        best=best_model(models, request.chosen_by),
        history=(),
        plan=None,
        resumed=True,
        algorithm=algorithm,
        why=str(facts.get("why", "")),
        bottleneck=str(facts.get("bottleneck", "")),
        hit_rates=dict(facts.get("hit_rates", {})),
        **{name: facts.get(name, 0) for name in (*kept, "all_converged", "peak_host_bytes", "peak_device_bytes")},
    )


def _course(job: _Job, sample: Sample, judged: np.ndarray) -> Course:
    trained = len(sample.rows) - int(_watched(job, sample).sum())
    return course_of(job.request, job.source, sample, judged, trained)


def _watched(job: _Job, sample: Sample) -> np.ndarray:
    """Which rows of the sample a stepwise run keeps for judging its passes, (n,) bool."""
    n = len(sample.rows)
    chosen = np.random.default_rng([job.request.seed, 3]).permutation(n)[: min(WATCHED_ROWS, n // 8)]
    return np.isin(np.arange(n), chosen)


def _watch(job: _Job, sample: Sample) -> Watch | None:
    """What passes are judged on; None where that would be fewer than two rows."""
    kept = sample.where(_watched(job, sample))
    weights = np.ones(len(kept.rows)) if kept.weights is None else kept.weights
    rows = torch.from_numpy(kept.rows).to(job.device)
    return Watch(rows, torch.from_numpy(weights)) if len(rows) > 1 else None


def _drawn(job: _Job, weighting: Weighting, sample: Sample | None) -> Candidates | None:
    """Candidates for seeds from every row, on the leader, whose ``sample`` it is."""
    request = job.request
    precision = "high" if request.precision == "auto" else request.precision
    with _feed(job) as feed:
        stream = Stream(
            job.source, feed.ring, feed.chunk_rows, weighting, job.device, precision, job.workers, job.world
        )
        return candidates(stream, max(request.sizes), request.seed, sample)


def _seeded(
    job: _Job, sample: Sample, course: Course, check_rows: torch.Tensor, drawn: Candidates | None
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
    candidates = tuple(Candidate(mixture, _first_precision(job, mixture.n_components)) for mixture in mixtures)
    return TrainingState(candidates, frame, rows_read=rows_read)


def _first_precision(job: _Job, n_components: int) -> str:
    n, d = job.source.shape
    problem = Problem(n_components, d, job.request.covariance_type)
    on_cpu = job.device.type == "cpu"
    return first_precision(job.request.precision, n * n_components * n_row_features(problem) if on_cpu else inf)


def _first(job: _Job, sample: Sample, frame: Frame, drawn: Candidates | None) -> Callable[[int, int], Mixture]:
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


def _grown(job: _Job, sample: Sample, frame: Frame, first: Mixture, check_rows: torch.Tensor) -> Mixture:
    """``first`` grown on the sample to the size asked for."""
    job.progress.stage("growing")
    if sample.weights is not None:
        sample = replace(sample, weights=sample.weights * power_of_two_near(sample.weights))
    request, rows, weights = job.request, *_on_device(job, sample)
    chunk = job.plan.chunk_rows
    em = SampleEM(rows, weights, check_rows, frame, request.precision, request.reg_covar, chunk, job.workers)
    counts = np.ones(len(rows)) if sample.weights is None else sample.weights
    return grown(first, request.sizes[0], em, sample.rows, counts, [request.seed, 4])


def _on_device(job: _Job, sample: Sample) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and weights of the sample."""
    rows = torch.from_numpy(sample.rows).to(job.device)
    return rows, None if sample.weights is None else torch.from_numpy(sample.weights).to(job.device)
