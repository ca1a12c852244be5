"""Streamed use of a fitted mixture: likelihoods, labels and responsibilities, a chunk at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from streamgmm.arriving import Arriving
from streamgmm.device import compute_workers
from streamgmm.errors import NumericalError, RequestError
from streamgmm.exact import exact_sum
from streamgmm.frame import Frame
from streamgmm.io.bfloat16 import as_tensor
from streamgmm.io.plan import Span, plan_chunks
from streamgmm.io.readers import reader_threads
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.kernels import Kernel, Problem, TopComponents, select_kernel
from streamgmm.kernels.tiled import TiledKernel, TiledParameters, normalise
from streamgmm.memory import Wishes, plan_inference
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.precision import CHECK_ROWS, choose_precision, first_precision
from streamgmm.sampling import factors_of
from streamgmm.seeding import check_finite, uniform_rows
from streamgmm.statistics import SEGMENTS

KernelType = TypeVar("KernelType", bound=Kernel)


@dataclass(frozen=True)
class Posterior:
    """What one chunk of rows gives, on the host.

    Attributes
    ----------
    log_likelihood : (n,) fp64 array
        log p(x), nats.
    labels : (n, M) int32 array
        The M most responsible components, best first; ties go to the lower index.
    resp : (n, M) float32 array
        Their responsibilities.
    """

    log_likelihood: Float64Array
    labels: np.ndarray
    resp: np.ndarray


@dataclass(frozen=True)
class InferenceSettings:
    """How to compute; nothing here but ``precision`` and ``device`` changes a result.

    Attributes
    ----------
    memory_limit : int or None
        Bytes on the device (growth of the process on a CPU).
    notify : callable or None
        Told, in a line, what the user should know, as by `Ring`: a read that stalls.
    """

    device: torch.device
    precision: str = "auto"
    memory_limit: int | None = None
    chunk_rows: int | None = None
    threads: int = field(default_factory=reader_threads)
    host_memory: int | None = None
    notify: Callable[[str], None] | None = None


def posteriors(source: Source, mixture: Mixture, top: int, settings: InferenceSettings) -> Iterator[Posterior]:
    """Likelihood, labels and responsibilities of every row, in order, ``top`` components each.

    Raises
    ------
    RequestError
        The data's dimension is not the mixture's, or ``top`` is out of range.
    DataError
        A row holds NaN or infinity; file, row and column are named.
    """

    if not 1 <= top <= mixture.n_components:
        raise RequestError(f"top must be between 1 and {mixture.n_components} (the components); got {top}")

    def of_rows(kernel: Kernel, rows: Tensor, parameters: Any) -> TopComponents:
        return kernel.top(rows, parameters, top)

    for likelihood, labels, resp in map_chunks(source, mixture, settings, select_kernel, of_rows, 8 * top + 8, top):
        yield Posterior(likelihood.numpy(), labels.numpy(), resp.numpy())


def responsibilities(source: Source, mixture: Mixture, settings: InferenceSettings) -> Iterator[np.ndarray]:
    """Dense responsibilities, (n, K) of the working type a chunk, in order. Raises as `posteriors`."""

    def of_tile(joint: Tensor) -> tuple[Tensor, ...]:
        resp, log_likelihood = normalise(joint)
        return log_likelihood, resp.T

    def of_rows(kernel: TiledKernel, rows: Tensor, parameters: TiledParameters) -> tuple[Tensor, ...]:
        tiles = kernel.map_joint(of_tile, rows, parameters)
        return tuple(torch.cat(pieces) for pieces in zip(*tiles, strict=True))

    for _, resp in map_chunks(source, mixture, settings, _dense_kernel, of_rows, 8 * mixture.n_components + 8):
        yield resp.numpy()


def _dense_kernel(problem: Problem, precision: str, device: torch.device, workers: int) -> TiledKernel:
    """The one kernel that shows its tiles of N×K."""
    # On a GPU ``precision`` was checked with another kernel: fp64 is no less precise, whichever that was.
    narrow = precision != "highest" and device.type == "cpu"
    return TiledKernel(torch.float32 if narrow else torch.float64, workers)


def log_likelihoods(source: Source, mixture: Mixture, settings: InferenceSettings) -> Iterator[Float64Array]:
    """log p(x) of every row, nats, (n,) fp64 a chunk, in order. Raises as `posteriors`."""

    def of_rows(kernel: Kernel, rows: Tensor, parameters: Any) -> tuple[Tensor, ...]:
        return (kernel.log_likelihood(rows, parameters),)

    for (likelihood,) in map_chunks(source, mixture, settings, select_kernel, of_rows, 8):
        yield likelihood.numpy()


def mean_log_likelihood(source: Source, mixture: Mixture, settings: InferenceSettings) -> float:
    """Mean of log p(x) over all rows, nats a sample. Raises as `posteriors`."""
    return exact_sum(log_likelihoods(source, mixture, settings)) / source.shape[0]


def map_chunks(
    source: Source,
    mixture: Mixture,
    settings: InferenceSettings,
    select: Callable[[Problem, str, torch.device, int], KernelType],
    of_rows: Callable[[KernelType, Tensor, Any], tuple[Tensor, ...]],
    result_bytes: int,
    top: int = 0,
) -> Iterator[tuple[Tensor, ...]]:
    """``of_rows`` of each chunk, on the host, by the kernel that ``select`` gives.

    Parameters
    ----------
    of_rows : callable
        Of kernel, rows (n, D) on the device, and the kernel's parameters: tensors of n rows each, the first of which
        is finite wherever the row is.
    result_bytes : int
        What they take a row.
    top : int
        Components ranked a row; 0 where none are.

    Raises
    ------
    RequestError
        The data's dimension is not the mixture's, or the memory limit cannot be met.
    DataError
        A row holds NaN or infinity; file, row and column are named.
    NumericalError
        The first result is not finite although the row is.
    """
    n, d = source.shape
    if d != mixture.n_features:
        raise RequestError(f"{source.name} has {d} features and the model {mixture.n_features}; give matching data")
    frame, device, workers = frame_of_mixture(mixture, source.dtype), settings.device, compute_workers(settings.device)
    sample = uniform_rows(n, min(n, CHECK_ROWS), np.random.default_rng(0))
    rows, _ = source.gather(sample)
    check_finite(source, rows, sample)
    precision = settings.precision
    if precision == "auto":
        check = as_tensor(rows).to(device)
        precision = choose_precision(mixture, frame, first_precision(precision), check, workers)
    problem = Problem(mixture.n_components, d, mixture.covariance_type)
    kernel = select(problem, precision, device, workers)
    wishes = Wishes(settings.memory_limit, settings.chunk_rows, settings.threads, workers)
    plan = plan_inference(source, problem, device, wishes, kernel, result_bytes, top)
    parameters = kernel.parameters(mixture, frame, device)
    # The results of a chunk cross to the host, and are used there, while the device works at the next one.
    behind, sent = int(device.type == "cuda"), deque[tuple[Span, Arriving]]()

    def first_arrived() -> tuple[Tensor, ...]:
        span, arriving = sent.popleft()
        finite, *results = arriving.wait()
        if not finite:
            _explain(source, span, precision)
        return tuple(results)

    kept = settings.host_memory
    with Ring(source, plan.chunk_rows, device, plan.threads, host_memory=kept, notify=settings.notify) as ring:
        for chunk in ring.stream(plan_chunks(n, plan.chunk_rows, most=SEGMENTS)):
            results = of_rows(kernel, chunk.rows, parameters)
            sent.append((chunk.span, Arriving.sent(torch.isfinite(results[0]).all(), *results)))
            if len(sent) > behind:
                yield first_arrived()
        while sent:
            yield first_arrived()


def _explain(source: Source, span: Span, precision: str) -> None:
    check_finite(source, source.read(span.start, span.stop), np.arange(span.start, span.stop))
    raise NumericalError(
        f"{source.name}: a likelihood in rows {span.start} to {span.stop} is not finite in precision "
        f"{precision!r}; use precision='highest'"
    )


def frame_of_mixture(mixture: Mixture, dtype: np.dtype[np.generic]) -> Frame:
    """The frame for rows of ``dtype`` from the parameters alone: the mixture's own mean and deviation."""
    kind, d = mixture.covariance_type, mixture.n_features
    mean = mixture.weights @ mixture.means
    own = mixture.covariances
    if kind in ("full", "tied"):
        own = np.diagonal(own, axis1=-2, axis2=-1)
    if kind != "tied":
        own = np.broadcast_to(mixture.weights @ own, d)
    variances = own + mixture.weights @ (mixture.means - mean) ** 2
    if kind == "spherical":
        variances = np.full(d, variances.mean())
    return Frame.about(mean, np.sqrt(variances), dtype)


def sample(mixture: Mixture, n_samples: int, rng: np.random.RandomState) -> tuple[Float64Array, np.ndarray]:
    """Draw rows (n, D) fp64 and their components (n,), grouped by component as scikit-learn does."""
    if n_samples < 1:
        raise RequestError(f"n_samples must be at least 1; got {n_samples}")
    factors = factors_of(mixture)
    counts = rng.multinomial(n_samples, mixture.weights)
    pieces = []
    for k, count in enumerate(counts):
        noise = rng.standard_normal((int(count), mixture.n_features))
        if mixture.covariance_type in ("diag", "spherical"):
            deviations = noise * factors[k]
        else:
            deviations = noise @ (factors if mixture.covariance_type == "tied" else factors[k]).T
        pieces.append(mixture.means[k] + deviations)
    return np.concatenate(pieces), np.repeat(np.arange(mixture.n_components), counts)
