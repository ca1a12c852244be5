"""One fit from source to result: plan, sample, start or resume, train, save."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from streamgmm.algorithm import rows_to_judge_order, sampled_rows
from streamgmm.checkpoint import History
from streamgmm.consistency import check_fits
from streamgmm.distributed import ALONE, Message, World
from streamgmm.errors import DamagedFileError, RunError
from streamgmm.estep import bind
from streamgmm.evaluation import Evaluation, evaluate
from streamgmm.feed import Feed
from streamgmm.io.sources.base import Source
from streamgmm.job import Job, job_of, open_feed, pool_rows
from streamgmm.mixture import Mixture
from streamgmm.parallel import one_thread
from streamgmm.passes import Course
from streamgmm.precision import check_sample, choose_precision, first_precision
from streamgmm.recorder import Progress, Recorder
from streamgmm.request import FitRequest, identity_of
from streamgmm.result import FitResult, FittedModel, best_model
from streamgmm.run import RunFolder
from streamgmm.seeding import draw_sample
from streamgmm.sharing import spread
from streamgmm.starting import chosen_course, drawn_candidates, seeded, watch_of
from streamgmm.state import TrainingState, best_of
from streamgmm.steps.candidate import Candidate, Step
from streamgmm.steps.collapse import repair_policy
from streamgmm.steps.em import EMStep
from streamgmm.steps.kmeans import KMeansStep
from streamgmm.steps.squarem import Squarem
from streamgmm.steps.stepwise import Schedule, StepwiseStep
from streamgmm.task import Lead, Training, TrainingSettings
from streamgmm.training import train
from streamgmm.transforms import Transformation
from streamgmm.usage import usage_of
from streamgmm.weighting import Weighting, power_of_two_near


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
    job = job_of(source, request, progress, world)
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
    job = job_of(source, request, progress, world)
    job.progress.stage("waiting")
    told = world.broadcast(None)
    if told.facts == _NOTHING_TO_DO.facts:
        return
    # How often to go on is the leader's to say.
    weighting = replace(_weighting(request), scale=float(told.facts["scale"]))
    if told.facts["draws"]:
        drawn_candidates(job, weighting, None)
    settings = _settings(job, weighting, "em")
    with open_feed(job) as feed:
        recorder = Recorder(
            source.shape[0], feed.ring, None, job.progress, float("inf"), History(), time.perf_counter()
        )
        job.progress.stage("training")
        streaming = time.perf_counter()
        train(None, Training(source, settings, job.device, recorder, world), feed)
        if len(request.sizes) > 1 or request.holdout:
            job.progress.stage("evaluating")
            _evaluations(job, None, settings, feed)
        usage_of(job, feed, streaming)


_NOTHING_TO_DO = Message({"finished": True})


@one_thread()
def _fit(job: Job, run: RunFolder | None) -> FitResult:
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
    pool = sample.rows[: pool_rows(source, request)].copy()
    course = chosen_course(job, sample, judged) if loaded is None else loaded[0].course
    sample = replace(sample, beside=sample.beside[:0])  # all that is held from here on was asked for
    if course.why:
        progress.note(course.why)
    draws = loaded is None and request.draws_seeds
    job.world.broadcast(Message({"scale": weighting.scale, "draws": draws}))
    if loaded is None:
        progress.stage("seeding")
        drawn = drawn_candidates(job, weighting, sample) if draws else None
        state, history = replace(seeded(job, sample, course, check_rows, drawn), course=course), History()
    else:
        state, history, _ = loaded
    watch = watch_of(job, sample) if course.planned_passes else None
    del sample
    settings = _settings(job, weighting, course.algorithm)
    with open_feed(job) as feed:
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
        usage = usage_of(job, feed, streaming)
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


def _settings(job: Job, weighting: Weighting, algorithm: str) -> TrainingSettings:
    request = job.request
    return TrainingSettings(
        weighting, request.iterations(algorithm), request.max_passes, request.precision, job.workers, request.hard
    )


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
    job: Job,
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


def _evaluations(job: Job, final: TrainingState | None, settings: TrainingSettings, feed: Feed) -> list[Evaluation]:
    """Of the candidates of ``final``, which the leader brings; the others get nothing."""
    shared = spread(final, job.world, job.device)
    assert shared is not None
    bound = [
        bind(candidate.mixture, shared.frame, candidate.precision, job.device, job.workers, job.request.hard)
        for candidate in shared.candidates
    ]
    return evaluate(job.source.shape[0], bound, settings.weighting, feed.end(), feed.chunks, job.world)


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
        n_processes=int(facts.get("n_processes", 1)),
        **{name: facts.get(name, 0) for name in (*kept, "all_converged", "peak_host_bytes", "peak_device_bytes")},
    )
