"""One fit from source to result: plan, sample, seed or resume, train, save."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from streamgmm.checkpoint import History
from streamgmm.device import compute_workers, resolve_device
from streamgmm.errors import RunError
from streamgmm.frame import frame_of
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.kernels import Problem
from streamgmm.memory import MemoryPlan, Wishes, plan_fit
from streamgmm.mixture import Mixture
from streamgmm.parallel import one_thread
from streamgmm.precision import check_sample, first_precision
from streamgmm.recorder import Progress, Recorder
from streamgmm.request import FitRequest, identity_of, validate
from streamgmm.run import RunFolder
from streamgmm.seeding import draw_sample, first_mixture
from streamgmm.steps.em import Candidate, StepSettings
from streamgmm.training import TrainingSettings, TrainingState, train


@dataclass(frozen=True, eq=False)
class FitResult:
    """The best candidate and how it came about.

    Attributes
    ----------
    mixture : Mixture
    lower_bounds : tuple of float
        Mean log-likelihood before each update, nats a sample.
    converged, n_iter, n_passes, seconds
    all_converged : bool
        Whether no other start is left that a larger ``max_iter`` would go on with.
    bytes_read : int
        Since the beginning of the run; an interrupted run's earlier passes are included.
    bytes_streamed : int
        By this process, in passes; ``seconds`` too is this process's.
    resumed : bool
        Whether a checkpoint, or a finished run, was taken up.
    seconds_waiting : float
        Time this process stood waiting for data.
    peak_device_bytes, peak_host_bytes : int
    history : tuple of dict
        One record an iteration and candidate.
    plan : MemoryPlan or None
        None when the run was finished already.
    """

    mixture: Mixture
    lower_bounds: tuple[float, ...]
    converged: bool
    all_converged: bool
    n_samples: int
    n_passes: float
    seconds: float
    seconds_waiting: float
    bytes_read: int
    bytes_streamed: int
    resumed: bool
    peak_host_bytes: int
    peak_device_bytes: int
    history: History
    plan: MemoryPlan | None

    @property
    def n_iter(self) -> int:
        return len(self.lower_bounds)

    def summary(self) -> dict[str, object]:
        """The facts that ``fit --json`` prints."""
        return {
            "n_samples": self.n_samples,
            "n_features": self.mixture.n_features,
            "n_components": self.mixture.n_components,
            "covariance_type": self.mixture.covariance_type,
            "n_iter": self.n_iter,
            "n_passes": self.n_passes,
            "converged": self.converged,
            "lower_bound": self.lower_bounds[-1] if self.lower_bounds else None,
            "seconds": self.seconds,
            "seconds_waiting": self.seconds_waiting,
            "bytes_read": self.bytes_read,
            "bytes_streamed": self.bytes_streamed,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "resumed": self.resumed,
            "digest": self.mixture.digest,
        }


def fit(
    source: Source,
    request: FitRequest,
    output: Path | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> FitResult:
    """Fit a mixture to every row of ``source``.

    With ``output``, a RUN folder, an unfinished run there is resumed and the result is left there; ``fresh`` moves
    what is there aside and starts over.

    Raises
    ------
    RequestError, DataError, RunError
        The request cannot be met; nothing was overwritten.
    NumericalError
        No finite result.
    Interrupted
        ``progress.stop_requested`` named a signal; a checkpoint was written first.
    """
    progress = progress or Progress()
    validate(request, source)
    device = resolve_device(request.device)
    workers = compute_workers(device)
    problem = Problem(request.n_components, source.shape[1], request.covariance_type)
    plan = plan_fit(
        source,
        problem,
        device,
        Wishes(request.memory_limit, request.chunk_rows, request.threads, workers),
        n_candidates=request.n_init,
    )
    job = _Job(source, request, device, workers, plan, progress)
    if output is None:
        return _fit(job, None)
    run = RunFolder(output, fresh=fresh)
    try:
        run.begin(identity_of(request, source, device))
        result = _finished(run, request)
        if result is None:
            run.commit()
            result = _fit(job, run)
            details = {"lower_bounds": list(result.lower_bounds), "all_converged": result.all_converged}
            run.finish(result.mixture, {**result.summary(), **details})
        return result
    finally:
        run.close()


@dataclass(frozen=True, eq=False)
class _Job:
    """A request that was found possible, and what it will use."""

    source: Source
    request: FitRequest
    device: torch.device
    workers: int
    plan: MemoryPlan
    progress: Progress


@one_thread()
def _fit(job: _Job, run: RunFolder | None) -> FitResult:
    """Seed or resume, train, and describe the best candidate."""
    source, request, device, progress = job.source, job.request, job.device, job.progress
    n_samples, n_features = source.shape
    begun = time.perf_counter()
    loaded = run.latest(device, progress.warn) if run else None
    progress.stage("sampling")
    sample, sampled = draw_sample(source, request.n_components, request.seed)
    rows = torch.from_numpy(sample).to(device)
    check_rows = check_sample(rows)
    if loaded is None:
        progress.stage("seeding")
        state, history = _seeded(request, sample, rows, sampled, job.workers), History()
    else:
        state, history, _ = loaded
    del sample, rows
    settings = TrainingSettings(
        StepSettings(request.tol, request.reg_covar),
        request.max_iter,
        request.max_passes,
        request.precision,
        job.workers,
    )
    with Ring(source, job.plan.chunk_rows, device, job.plan.threads) as ring:
        recorder = Recorder(n_samples, ring, run, progress, request.checkpoint_every, history, begun)
        progress.stage("training")
        state = train(state, source, ring, job.plan.chunk_rows, check_rows, settings, recorder)
        recorder.save(state)
    best = state.best
    return FitResult(
        mixture=best.mixture,
        lower_bounds=best.lower_bounds,
        converged=best.converged,
        all_converged=not state.active,
        n_samples=n_samples,
        n_passes=state.rows_read / n_samples,
        seconds=time.perf_counter() - begun,
        seconds_waiting=ring.traffic.seconds_waiting,
        bytes_read=state.rows_read * n_features * source.dtype.itemsize,
        bytes_streamed=ring.traffic.bytes_read,
        resumed=loaded is not None,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        history=recorder.history,
        plan=job.plan,
    )


def peak_host_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _finished(run: RunFolder, request: FitRequest) -> FitResult | None:
    """The result of a run that has nothing left to do under ``request``."""
    found = run.result()
    if found is None:
        return None
    mixture, metadata = found
    facts = metadata.get("result")
    if not isinstance(facts, dict) or "all_converged" not in facts:
        raise RunError(f"{run.path}: holds a model that no fit wrote; name another --output")
    bounds = tuple(facts["lower_bounds"])
    n_passes = float(facts["n_passes"])
    if len(bounds) > request.max_iter:
        raise RunError(
            f"{run.path}: has run {len(bounds)} iterations already, more than max_iter={request.max_iter}; "
            f"ask for {len(bounds)} or more, or name another --output"
        )
    if not facts["all_converged"] and len(bounds) < request.max_iter and n_passes + 1 <= request.max_passes:
        return None
    return FitResult(
        mixture=mixture,
        lower_bounds=bounds,
        history=(),
        plan=None,
        resumed=True,
        **{
            name: facts[name]
            for name in (
                "converged",
                "all_converged",
                "n_samples",
                "n_passes",
                "seconds",
                "seconds_waiting",
                "bytes_read",
                "bytes_streamed",
                "peak_host_bytes",
                "peak_device_bytes",
            )
        },
    )


def _seeded(request: FitRequest, sample: np.ndarray, rows: torch.Tensor, sampled: int, workers: int) -> TrainingState:
    frame = frame_of(sample, request.covariance_type)
    # One scale for all features: seeding measures distances in the data's own proportions.
    seeding_frame = frame_of(sample, "spherical")
    candidates = tuple(
        Candidate(
            first_mixture(
                rows,
                seeding_frame,
                request.n_components,
                request.covariance_type,
                request.init,
                request.start,
                request.reg_covar,
                [request.seed, 1 + i],
                workers,
            ),
            first_precision(request.precision),
        )
        for i in range(request.n_init)
    )
    return TrainingState(candidates, frame, rows_read=sampled)
