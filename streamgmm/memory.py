"""How much moves at once: a plan that fits the limit, made before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamgmm.errors import RequestError
from streamgmm.io.plan import round_chunk_rows
from streamgmm.io.ring import DEVICE_BUFFERS, SLOTS
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS, Problem, select_kernel
from streamgmm.precision import CHECK_ROWS
from streamgmm.seeding import sample_size
from streamgmm.statistics import BLOCK_ROWS, SEGMENTS, scatter_shape
from streamgmm.units import format_bytes

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
"""A chunk large enough that its fixed costs vanish; more buys nothing."""

_RUNTIME_BYTES = {"cpu": 24 << 20, "cuda": 64 << 20}
"""What libraries allocate for themselves while they work: decoders' and allocators' slack, BLAS buffers."""

_OPEN_NODES = SEGMENTS.bit_length() + 1


@dataclass(frozen=True)
class MemoryPlan:
    """What a run allocates.

    Attributes
    ----------
    chunk_rows : int
        Rows moved at once.
    needed : int
        Bytes on the device (growth of the process on a CPU) that the plan adds up to.
    limit : int or None
        Bytes allowed.
    """

    chunk_rows: int
    needed: int
    limit: int | None


def plan_memory(
    source: Source,
    problem: Problem,
    device: torch.device,
    limit: int | None,
    chunk_rows: int | None,
    workers: int,
    n_candidates: int = 1,
) -> MemoryPlan:
    """The largest useful chunk that fits ``limit`` bytes.

    Raises
    ------
    RequestError
        Even the smallest chunk does not fit; the message gives the limit that would do.
    """
    n, d = source.shape
    row_bytes = d * source.dtype.itemsize
    kernels = [select_kernel(problem.covariance_type, p, device, workers) for p in PRECISIONS]
    granule = max(kernel.granule(problem) for kernel in kernels)
    buffers = DEVICE_BUFFERS if device.type == "cuda" else SLOTS

    def needed(rows: int) -> int:
        rows = min(rows, n)
        scratch = max(kernel.scratch_bytes(problem, rows, workers) for kernel in kernels)
        check = min(n, CHECK_ROWS)
        streaming = buffers * rows * row_bytes + scratch + check * row_bytes
        if source.read_granule > 1 and device.type == "cpu":
            streaming += workers * min(n, source.read_granule) * row_bytes
        sample = sample_size(n, d, problem.n_components)
        # Stored rows, centred fp32 rows, and one tile's worth of distances a worker.
        seeding = sample * (row_bytes + 12 * d) + (workers + 1) * 2048 * 8 * problem.n_components
        resident = _statistics_bytes(problem) * (_OPEN_NODES + 4) * n_candidates
        return max(streaming, seeding) + resident + _RUNTIME_BYTES[device.type]

    wanted = chunk_rows or max(1, _CHUNK_BYTES[device.type] // row_bytes)
    rows = round_chunk_rows(max(wanted, granule), granule)
    while limit is not None and needed(rows) > limit and rows > granule:
        rows = rows // 2 if rows <= BLOCK_ROWS else round_chunk_rows(rows // 2, granule)
    if limit is not None and needed(rows) > limit:
        raise RequestError(
            f"memory limit {format_bytes(limit)} is too small for {problem.n_components} {problem.covariance_type} "
            f"components of {d} features: at least {format_bytes(needed(granule))} is needed; raise --memory "
            "(memory_limit) or fit fewer components"
        )
    return MemoryPlan(rows, needed(rows), limit)


def _statistics_bytes(problem: Problem) -> int:
    """fp64 counts, sums and scatter of one mixture."""
    k, d = problem.n_components, problem.n_features
    scatter = 1
    for length in scatter_shape(problem.covariance_type, k, d):
        scatter *= length
    return 8 * (k + k * d + scatter)
