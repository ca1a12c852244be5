"""Shards in the order of the source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.prepare.job import Job, Noted
from streamgmm.prepare.selection import stored
from streamgmm.prepare.shards import ShardWriter


def write_shard(job: Job, output: int, shard: int) -> Noted:
    """One shard of rows, and its row numbers where they are wanted, in the order of the source."""
    assert job.recipe is not None
    assert job.ranks is not None
    source = job.reference.open()
    low, high = job.layouts[output].bounds(shard)
    start, stop = job.ranks.holding(output, low, high)
    rank = job.ranks.first(output, start)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal rank
        assert job.recipe is not None
        assert job.transformation is not None
        for granule in job.recipe.granules(source, start, stop):
            numbers = np.flatnonzero(granule.masks[output])
            inside = numbers[max(0, low - rank) : max(0, high - rank)]
            rank += len(numbers)
            if len(inside):
                rows = stored(source, granule, compact(inside), job.transformation)
                yield rows, job.ids_of(granule.first + inside)

    return write_pieces(job, output, shard, pieces())


def compact(numbers: NDArray[np.int64]) -> Any:
    """Consecutive ``numbers`` as a slice, which copies nothing."""
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    return slice(first, last) if last - first == len(numbers) else numbers


def write_pieces(job: Job, output: int, shard: int, pieces: Iterator[tuple[np.ndarray, np.ndarray]]) -> Noted:
    """A shard from its rows, and their numbers, as they come; each file appears under its name when it is whole."""
    low, high = job.layouts[output].bounds(shard)
    with ExitStack() as stack:
        rows_to = stack.enter_context(ShardWriter(job.shard(output, shard), job.layouts[output], high - low))
        ids_to = None
        if job.with_ids:
            ids_to = stack.enter_context(ShardWriter(job.ids_shard(output, shard), job.ids_layout(output), high - low))
        for rows, ids in pieces:
            rows_to.write(rows)
            if ids_to is not None:
                ids_to.write(ids)
    files = {job.relative(job.shard(output, shard)): rows_to.digest}
    if ids_to is not None:
        files[job.relative(job.ids_shard(output, shard))] = ids_to.digest
    return {"files": files, "bytes": rows_to.size + (ids_to.size if ids_to is not None else 0), "rows": high - low}
