"""One fit from source to result: plan, sample, seed or resume, train, save."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from streamgmm.checkpoint import History
from streamgmm.errors import Interrupted, RequestError, RunError
from streamgmm.frame import frame_of
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS, Problem
from streamgmm.memory import MemoryPlan, plan_memory
from streamgmm.mixture import COVARIANCE_TYPES, Mixture, covariance_shape
from streamgmm.precision import check_sample, first_precision
from streamgmm.run import RunFolder
from streamgmm.seeding import INIT_METHODS, Start, draw_sample, first_mixture
from streamgmm.steps.em import Candidate, StepSettings
from streamgmm.training import TrainingSettings, TrainingState, train

_FORMAT = 1
"""Raised when the bits of a result change: a run of another format cannot be resumed."""


@dataclass(frozen=True, eq=False)
class FitRequest:
    """Everything a user can ask of a fit. Defaults are those of scikit-learn where it has the parameter.

    Attributes that change the result: n_components, covariance_type, tol, reg_covar, max_iter, max_passes, n_init,
    init, start, seed, precision, device. The others change only speed and memory.
    """

    n_components: int
    covariance_type: str = "full"
    tol: float = 1e-3
    reg_covar: float = 1e-6
    max_iter: int = 100
    max_passes: float = float("inf")
    n_init: int = 1
    init: str = "kmeans"
    start: Start = field(default_factory=Start)
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    memory_limit: int | None = None
    chunk_rows: int | None = None
    threads: int = 4
    checkpoint_every: float = 60.0


@dataclass(frozen=True, eq=False)
class FitResult:
    """The best candidate and how it came about.

    Attributes
    ----------
    mixture : Mixture
    lower_bounds : tuple of float
        Mean log-likelihood before each update, nats a sample.
    converged, n_iter, n_passes, seconds
    bytes_read : int
        Since the beginning of the run; an interrupted run's earlier passes are included.
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
    n_samples: int
    n_passes: float
    seconds: float
    seconds_waiting: float
    bytes_read: int
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
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "resumed": self.resumed,
            "digest": self.mixture.digest,
        }


class Progress:
    """What a fit tells while it runs; this one keeps silent."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        """A chunk was absorbed."""

    def iteration(self, record: dict[str, object]) -> None:
        """A candidate was updated."""

    def warn(self, text: str) -> None:
        """Something that does not stop the run."""

    def stop_requested(self) -> int | None:
        """The signal that asked the run to stop, or None."""
        return None


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
    _validate(request, source)
    device = resolve_device(request.device)
    workers = os.cpu_count() or 1
    problem = Problem(request.n_components, source.shape[1], request.covariance_type)
    plan = plan_memory(
        source, problem, device, request.memory_limit, request.chunk_rows, workers, n_candidates=request.n_init
    )
    job = _Job(source, request, device, workers, plan, progress)
    if output is None:
        return _fit(job, None)
    run = RunFolder(output, fresh=fresh)
    try:
        run.begin(_identity(request, source, device))
        result = _finished(run, request)
        if result is None:
            result = _fit(job, run)
            run.finish(result.mixture, {**result.summary(), "lower_bounds": list(result.lower_bounds)})
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


def _fit(job: _Job, run: RunFolder | None) -> FitResult:
    """Seed or resume, train, and describe the best candidate."""
    source, request, device, progress = job.source, job.request, job.device, job.progress
    begun = time.perf_counter()
    loaded = run.checkpoints.latest(device, progress.warn) if run and run.checkpoints else None
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
    with Ring(source, job.plan.chunk_rows, device, request.threads) as ring:
        recorder = _Recorder(source, ring, run, progress, request.checkpoint_every, history, begun)
        progress.stage("training")
        state = train(state, source, ring, job.plan.chunk_rows, check_rows, settings, recorder)
        recorder.save(state)
    best = max(state.candidates, key=lambda c: c.lower_bounds[-1] if c.lower_bounds else -np.inf)
    return FitResult(
        mixture=best.mixture,
        lower_bounds=best.lower_bounds,
        converged=best.converged,
        n_samples=source.shape[0],
        n_passes=state.rows_read / source.shape[0],
        seconds=time.perf_counter() - begun,
        seconds_waiting=ring.traffic.seconds_waiting,
        bytes_read=state.rows_read * source.shape[1] * source.dtype.itemsize,
        resumed=loaded is not None,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        history=recorder.history,
        plan=job.plan,
    )


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1`` as a device; what is asked for by name and missing raises."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise RequestError(f"device must be auto, cpu or cuda; got {name!r}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise RequestError(f"device {name!r} was asked for and {count} CUDA devices are there; use device='cpu'")
    return device


def peak_host_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _validate(request: FitRequest, source: Source) -> None:
    n, d = source.shape
    k = request.n_components
    if k < 1:
        raise RequestError(f"n_components must be at least 1; got {k}")
    if k > n:
        raise RequestError(f"n_components is {k} and {source.name} has only {n} rows; ask for at most {n} components")
    if request.covariance_type not in COVARIANCE_TYPES:
        raise RequestError(
            f"covariance_type must be one of {', '.join(COVARIANCE_TYPES)}; got {request.covariance_type!r}"
        )
    if request.init not in INIT_METHODS:
        raise RequestError(f"init must be one of {', '.join(INIT_METHODS)}; got {request.init!r}")
    if request.precision not in ("auto", *PRECISIONS):
        raise RequestError(f"precision must be auto or one of {', '.join(PRECISIONS)}; got {request.precision!r}")
    for name, least in (("tol", 0), ("reg_covar", 0), ("max_iter", 0), ("n_init", 1), ("threads", 1)):
        if not getattr(request, name) >= least:
            raise RequestError(f"{name} must be at least {least}; got {getattr(request, name)}")
    if request.chunk_rows is not None and request.chunk_rows < 1:
        raise RequestError(f"chunk_rows must be at least 1; got {request.chunk_rows}")
    shapes = {
        "weights": (k,),
        "means": (k, d),
        "precisions": covariance_shape(request.covariance_type, k, d),
    }
    for name, shape in shapes.items():
        given = getattr(request.start, name)
        if given is not None and np.shape(given) != shape:
            raise RequestError(f"{name}_init must have shape {shape}; got {np.shape(given)}")


def _identity(request: FitRequest, source: Source, device: torch.device) -> dict[str, object]:
    """What a run's result depends on: must be equal for it to be resumed."""
    start = {
        name: None if value is None else np.asarray(value, dtype=np.float64).tolist()
        for name, value in asdict(request.start).items()
    }
    return {
        "format": _FORMAT,
        "fingerprint": source.fingerprint,
        "shape": list(source.shape),
        "device": device.type,
        "start": start,
        **{
            name: getattr(request, name)
            for name in ("n_components", "covariance_type", "tol", "reg_covar", "n_init", "init", "seed", "precision")
        },
        "max_iter": request.max_iter,
        "max_passes": None if request.max_passes == float("inf") else request.max_passes,
    }


def _finished(run: RunFolder, request: FitRequest) -> FitResult | None:
    """The result of a run that has nothing left to do under ``request``."""
    found = run.result()
    if found is None:
        return None
    mixture, metadata = found
    facts = metadata.get("result")
    if not isinstance(facts, dict):
        raise RunError(f"{run.path}: holds a model that no fit wrote; name another --output")
    bounds = tuple(facts["lower_bounds"])
    n_passes = float(facts["n_passes"])
    if len(bounds) > request.max_iter:
        raise RunError(f"{run.path}: has run {len(bounds)} iterations already, more than max_iter={request.max_iter}")
    if not facts["converged"] and len(bounds) < request.max_iter and n_passes + 1 <= request.max_passes:
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
                "n_samples",
                "n_passes",
                "seconds",
                "seconds_waiting",
                "bytes_read",
                "peak_host_bytes",
                "peak_device_bytes",
            )
        },
    )


def _seeded(request: FitRequest, sample: np.ndarray, rows: torch.Tensor, sampled: int, workers: int) -> TrainingState:
    frame = frame_of(sample, request.covariance_type)
    candidates = tuple(
        Candidate(
            first_mixture(
                rows,
                frame,
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


class _Recorder:
    """Sees the state after every chunk and update: history, progress, checkpoints by time, and signals."""

    def __init__(
        self,
        source: Source,
        ring: Ring,
        run: RunFolder | None,
        progress: Progress,
        every: float,
        history: History,
        begun: float,
    ) -> None:
        self._source, self._ring, self._run, self._progress = source, ring, run, progress
        self._checkpoints = run.checkpoints if run else None
        self._every = every
        self._begun = self._last_saved = begun
        self.history = history
        if run is not None:
            run.write_history(history)

    def __call__(self, state: TrainingState) -> None:
        updated = not state.partials
        if updated:
            self._record(state)
        self._progress.chunk(state, self._source.shape[0], self._ring)
        stop = self._progress.stop_requested()
        now = time.perf_counter()
        if stop is not None:
            self.save(state)
            saved = "run the same command again to go on" if self._checkpoints else "nothing was saved without --output"
            raise Interrupted(stop, f"stopped by {signal.Signals(stop).name}; {saved}")
        if self._checkpoints is not None and (updated or now - self._last_saved >= self._every):
            self._checkpoints.save(state, self.history)
            self._last_saved = now

    def save(self, state: TrainingState) -> None:
        """Checkpoint ``state`` and wait until it is durable."""
        if self._checkpoints is not None:
            self._checkpoints.save(state, self.history)
            self._checkpoints.flush()

    def _record(self, state: TrainingState) -> None:
        rows_read, n_samples = state.rows_read, self._source.shape[0]
        for i, candidate in enumerate(state.candidates):
            iteration = candidate.n_iter
            if iteration != state.n_iter:  # converged in an earlier pass
                continue
            bounds = candidate.lower_bounds
            record: dict[str, object] = {
                "candidate": i,
                "iteration": iteration,
                "lower_bound": bounds[-1],
                "change": bounds[-1] - bounds[-2] if iteration > 1 else None,
                "precision": candidate.precision,
                "converged": candidate.converged,
                "empty": list(candidate.empty),
                "degenerate": list(candidate.degenerate),
                "n_passes": rows_read / n_samples,
                "seconds": time.perf_counter() - self._begun,
            }
            self.history = (*self.history, record)
            self._progress.iteration(record)
            if self._run is not None:
                self._run.append_history(record)
