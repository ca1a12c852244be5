"""How much moves at once: a plan that fits the limit, made before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from streamgmm.errors import RequestError
from streamgmm.io.bfloat16 import value_dtype
from streamgmm.io.intake import DEVICE_BUFFERS, SLOTS
from streamgmm.io.plan import round_chunk_rows
from streamgmm.io.sources.base import Source
from streamgmm.kernels import Kernel, Problem, available_precisions, select_kernel
from streamgmm.precision import check_rows_on
from streamgmm.seeding import sample_size, seeding_bytes
from streamgmm.statistics import SEGMENTS, longest_segment, scatter_shape
from streamgmm.units import format_bytes

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Large enough that a chunk's fixed costs vanish beside reading it: on a GPU two milliseconds of the host."""

_LARGE_CHUNK_BYTES = 1 << 30
"""Large enough that they vanish beside the E-step of rows that stay on the GPU, for a fit with memory to spare,"""

_CHUNK_PART = 32
"""of which, on the device and on the host, a chunk takes no larger part than one in so many."""

_RUNTIME_BYTES = {"cpu": 24 << 20, "cuda": 64 << 20}
"""What libraries allocate for themselves while they work: decoders' and allocators' slack, BLAS buffers."""

_OPENED_BYTES = 64 << 20
"""Of the sums of segments that a GPU begins together, so that short ones share launches; and a part of the limit."""

_OPENED_PART = 16

_OPEN_NODES = SEGMENTS.bit_length() + 1
_UPDATE_COPIES = 4
"""Sums that an update holds besides the tree's: total, restored total, and the M-step's."""


@dataclass(frozen=True)
class Wishes:
    """What the user set: bytes allowed and rows at once (None: our choice), reader threads; and compute threads.

    ``host`` is how many bytes of a GPU's host may keep rows.
    """

    limit: int | None
    chunk_rows: int | None
    threads: int
    workers: int
    host: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What a run allocates.

    Attributes
    ----------
    chunk_rows : int
        Rows moved at once.
    threads : int
        Reader threads; fewer than wished where each decodes a large stored chunk.
    needed : int
        Bytes on the device (growth of the process on a CPU) that the plan adds up to.
    limit : int or None
        Bytes allowed.
    granule : int
        What a chunk must be a whole number of, should it have to shrink.
    segments : int
        How many segments may share a chunk where they fit one.
    """

    chunk_rows: int
    threads: int
    needed: int
    limit: int | None
    granule: int
    segments: int = 1


def plan_fit(
    source: Source,
    problems: Sequence[Problem],
    device: torch.device,
    wishes: Wishes,
    *,
    smaller: Sequence[Problem] = (),
    hard: bool = False,
    pool: int = 0,
    growth: int = 0,
    behind: int = 0,
    drawn: Problem | None = None,
    sampled: int | None = None,
) -> MemoryPlan:
    """The largest useful chunk with which a fit of a model of each of ``problems`` keeps to its limit.

    On its way a model may be one of the ``smaller`` problems; ``pool`` rows of the sample are kept. Where a model is
    grown on the sample, that takes ``growth`` bytes besides the sample and what a kernel needs. Of each ``behind`` more
    mixtures are kept. Passes before the first may find distances to the components of ``drawn``. The sample has
    ``sampled`` rows, where that is not for `sample_size` to say.

    Raises
    ------
    RequestError
        Even the smallest chunk does not fit; the message gives the limit that would do.
    """
    n, d = source.shape
    largest = max(problems, key=lambda problem: problem.n_components)
    precisions = available_precisions(largest, device, hard)
    kernels = [select_kernel(largest, p, device, wishes.workers, hard) for p in precisions]
    row_bytes = d * source.dtype.itemsize
    sample = sampled or sample_size(n, d, largest.n_components)
    sampled_bytes = d * value_dtype(source.dtype).itemsize
    seeding = sample * sampled_bytes + seeding_bytes(largest, sample, wishes.workers)
    sums = sum(statistics_bytes(problem) for problem in problems)
    segments = _segments_at_once(sums, device, wishes)
    # Segments that end together are joined together: half as many sums again.
    resident = sums * (_OPEN_NODES + _UPDATE_COPIES + behind + segments - 1 + segments // 2)
    # Fewer components may mean larger granules, and every chunk is a whole number of every model's.
    others = (*smaller, *([] if drawn is None else [drawn]))
    granule = max(kernel.granule(problem) for kernel in kernels for problem in (*problems, *others))

    longest = n if segments > 1 else longest_segment(n)

    def needed(rows: int, threads: int) -> int:
        rows = min(rows, longest)
        scratch = max(kernel.scratch_bytes(largest, rows, wishes.workers) for kernel in kernels)
        streaming = _streaming(source, device, rows, threads) + scratch
        kept = (min(n, check_rows_on(device)) + min(n, pool)) * sampled_bytes
        # The sample is there twice while rows are being set apart from it.
        growing = 2 * sample * sampled_bytes + scratch + growth if growth else 0
        return max(streaming + kept, seeding, growing, drawing(rows, threads)) + resident + _RUNTIME_BYTES[device.type]

    def drawing(rows: int, threads: int) -> int:
        if drawn is None:
            return 0
        m = drawn.n_components
        scratch = max(kernel.scratch_bytes(drawn, min(rows, n), wishes.workers) for kernel in kernels)
        # Candidates in fp64: as they are, merged and sorted; as parameters; and then as points to choose among.
        return (
            _streaming(source, device, rows, threads)
            + scratch
            + sample * sampled_bytes
            + 8 * 8 * m * d
            + seeding_bytes(largest, m, wishes.workers)
        )

    # Where it is the sample that takes most.
    fewer = f", lower --sample-rows (now {sample})" if seeding > _streaming(source, device, granule, 1) else ""
    chunk = _chunk_bytes(device, wishes)
    plan = _largest(source, largest, device, wishes, granule, row_bytes, needed, chunk, fewer)
    return replace(plan, segments=segments)


def plan_inference(
    source: Source,
    problem: Problem,
    device: torch.device,
    wishes: Wishes,
    kernel: Kernel,
    result_bytes: int,
    top: int = 0,
) -> MemoryPlan:
    """The same for streamed inference with ``result_bytes`` of results a row, which ranks ``top`` components of it.

    Raises as `plan_fit`.
    """

    def needed(rows: int, threads: int) -> int:
        scratch = kernel.scratch_bytes(problem, min(rows, source.shape[0]), wishes.workers, top)
        # A chunk's results exist as tiles and joined.
        results = 2 * min(rows, source.shape[0]) * result_bytes
        return _streaming(source, device, rows, threads) + scratch + results + _RUNTIME_BYTES[device.type]

    row_bytes = source.shape[1] * source.dtype.itemsize + 2 * result_bytes
    granule, chunk = kernel.granule(problem), _CHUNK_BYTES[device.type]
    return _largest(source, problem, device, wishes, granule, row_bytes, needed, chunk)


def _chunk_bytes(device: torch.device, wishes: Wishes) -> int:
    """Of the chunks of a fit."""
    least = _CHUNK_BYTES[device.type]
    if device.type != "cuda":
        return least
    there = wishes.limit or torch.cuda.get_device_properties(device).total_memory
    spare = min(there, there if wishes.host is None else wishes.host)
    return min(_LARGE_CHUNK_BYTES, max(least, spare // _CHUNK_PART))


def _segments_at_once(sums: int, device: torch.device, wishes: Wishes) -> int:
    """Segments, whose ``sums`` take so many bytes each, that share a chunk at most; on a CPU launches cost nothing."""
    if device.type != "cuda":
        return 1
    room = _OPENED_BYTES if wishes.limit is None else min(_OPENED_BYTES, wishes.limit // _OPENED_PART)
    return max(1, min(SEGMENTS, room // sums))


def _streaming(source: Source, device: torch.device, rows: int, threads: int) -> int:
    """Buffers of the ring, and what its readers decode into, where that is on the device's side of the limit."""
    n, d = source.shape
    row_bytes = d * source.dtype.itemsize
    buffers = (DEVICE_BUFFERS if device.type == "cuda" else SLOTS) * min(rows, n) * row_bytes
    if device.type == "cuda" or source.read_granule == 1:
        return buffers
    return buffers + 2 * threads * min(n, source.read_granule) * row_bytes


def _largest(
    source: Source,
    problem: Problem,
    device: torch.device,
    wishes: Wishes,
    granule: int,
    row_bytes: int,
    needed: Callable[[int, int], int],
    chunk_bytes: int,
    fewer: str = "",
) -> MemoryPlan:
    """The wished chunk and threads, made smaller until ``needed`` keeps to the limit: decoders first, then chunks."""
    # A stored chunk that is cut is decoded once for each piece.
    ours = max(chunk_bytes // row_bytes, source.read_granule)
    rows, threads = round_chunk_rows(max(wishes.chunk_rows or ours, granule), granule), wishes.threads
    limit = wishes.limit
    while limit is not None and needed(rows, threads) > limit:
        # Threads take memory where they decode, and only there.
        decoding = threads > 1 and needed(rows, threads - 1) < needed(rows, threads)
        if decoding and (threads > 2 or rows <= granule):
            threads -= 1
        elif rows > granule:
            rows = round_chunk_rows(max(rows // 2, granule), granule)
        else:
            break
    if limit is not None and needed(rows, threads) > limit:
        # Rounded up: the limit that is named must do.
        least = -(-needed(granule, 1) >> 20)
        raise RequestError(
            f"memory limit {format_bytes(limit)} is too small for {problem.n_components} {problem.covariance_type} "
            f"components of {problem.n_features} features: at least {least} MiB is needed; raise --memory "
            f"(memory_limit){fewer} or use fewer components"
        )
    return MemoryPlan(rows, threads, needed(rows, threads), limit, granule)


def statistics_bytes(problem: Problem) -> int:
    """fp64 counts, sums and scatter of one mixture."""
    k, d = problem.n_components, problem.n_features
    return 8 * (k + k * d + prod(scatter_shape(problem.covariance_type, k, d)))
