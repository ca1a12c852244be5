"""A request that was found possible, with the memory it will take, and how its rows are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from streamgmm.algorithm import sampled_rows
from streamgmm.device import compute_workers, resolve_device
from streamgmm.distributed import Message, World
from streamgmm.errors import DataError
from streamgmm.exchangeability import run_bytes
from streamgmm.feed import Feed
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.kernels import Problem
from streamgmm.kmeans_parallel import n_candidates
from streamgmm.memory import MemoryPlan, Wishes, plan_fit
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest, not_stepwise, validate
from streamgmm.statistics import longest_segment
from streamgmm.steps.gain import split_bytes
from streamgmm.steps.growth import first_size
from streamgmm.steps.squarem import MIXTURES_BEHIND
from streamgmm.steps.watch import WATCHED_ROWS

_POOL_ROWS = 8192
_POOL_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Job:
    """A request that was found possible, and what it will use."""

    source: Source
    request: FitRequest
    device: torch.device
    workers: int
    plan: MemoryPlan
    progress: Progress
    world: World


def job_of(source: Source, request: FitRequest, progress: Progress | None, world: World) -> Job:
    """The job that ``request`` is for ``source``. Raises as `fit`, also where another process sees other data."""
    validate(request, source)
    device = resolve_device(request.device, world.local_rank)
    workers = compute_workers(device, world.local_size)
    job = Job(source, request, device, workers, _plan(source, request, device, workers), progress or Progress(), world)
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
    wishes = Wishes(request.memory_limit, request.chunk_rows, request.threads, workers, request.host_memory)
    pool = pool_rows(source, request)
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


def pool_rows(source: Source, request: FitRequest) -> int:
    """Rows that empty components may restart from."""
    return min(_POOL_ROWS, max(1, _POOL_BYTES // (8 * source.shape[1]))) if request.collapse == "reseed" else 0


def open_feed(job: Job) -> Feed:
    """Rows as the plan cuts them; to be used as a context."""
    plan, request = job.plan, job.request
    host = None if request.host_memory is None else request.host_memory // job.world.local_size
    # What the plan leaves of the limit keeps the first chunks; without one, half of what is free. Of what is kept in a
    # narrower form, a granule at a time may be wanted as it is stored.
    again = plan.granule * job.source.shape[1] * job.source.dtype.itemsize
    spare = (_free_bytes(job.device) // 2 if plan.limit is None else plan.limit - plan.needed) - again

    # No chunk is longer.
    longest = job.source.shape[0] if plan.segments > 1 else longest_segment(job.source.shape[0])

    def open_ring(rows: int, kept: float) -> Ring:
        return Ring(
            job.source,
            min(rows, longest),
            job.device,
            plan.threads,
            host_memory=host,
            device_memory=max(0, int(kept * spare)),
            recheck=request.recheck,
            notify=job.progress.warn,
        )

    return Feed(open_ring, plan.chunk_rows, plan.granule, plan.segments)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
