"""Shards in the order of a permutation: rows are sorted by shard, a stretch of the source at a time, then gathered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DamagedFileError
from streamgmm.prepare.job import Job, Noted
from streamgmm.prepare.selection import TRAIN, stored
from streamgmm.prepare.shards import put_all, temporary_name
from streamgmm.prepare.writing import compact, write_pieces
from streamgmm.storage import naming

_SLICE_BYTES = 1 << 20


def write_run(job: Job, run: int) -> Noted:
    """The rows of a stretch of the source, sorted by the shard that they go to: the first half of the shuffle.

    The file holds where each shard's rows begin (int64, one more than there are shards), the rows, and their numbers
    where they are wanted. Rows for one shard stay in the order of the source.
    """
    assert job.recipe is not None
    assert job.ranks is not None
    assert job.transformation is not None
    source = job.reference.open()
    start = run * job.run_rows
    stop = min(start + job.run_rows, job.ranks.n_samples)
    layout = job.layouts[TRAIN]
    rows: np.ndarray = np.empty((stop - start, *layout.shape[1:]), np.dtype(layout.dtype))
    numbers: list[list[np.ndarray]] = [[], []]
    places: list[list[np.ndarray]] = [[], []]
    filled = 0
    for granule in job.recipe.granules(source, start, stop):
        for output in range(len(job.layouts)):
            mine = np.flatnonzero(granule.masks[output])
            if len(mine):
                rows[filled : filled + len(mine)] = stored(source, granule, compact(mine), job.transformation)
                numbers[output].append(granule.first + mine)
                places[output].append(np.arange(filled, filled + len(mine)))
                filled += len(mine)
    buckets: np.ndarray = np.empty(filled, np.int64)
    ids: np.ndarray = np.empty(filled, np.int64)
    for output, each in enumerate(job.layouts):
        if numbers[output]:
            where = np.concatenate(places[output])
            ranks = job.ranks.first(output, start) + np.arange(len(where))
            buckets[where] = job.bucket(output) + job.permutation(output).forward(ranks) // each.shard_rows
            ids[where] = job.ids_of(np.concatenate(numbers[output]))
    order = np.argsort(buckets, kind="stable")
    table = np.searchsorted(buckets[order], np.arange(job.bucket(len(job.layouts)) + 1)).astype(np.int64)
    return _write_run(job, job.run(run), table, rows, ids, order)


def _write_run(
    job: Job, path: Path, table: NDArray[np.int64], rows: np.ndarray, ids: np.ndarray, order: np.ndarray
) -> Noted:
    temporary, sha, size = temporary_name(path), hashlib.sha256(), 0
    step = max(1, _SLICE_BYTES // job.layouts[TRAIN].row_bytes)

    def pieces() -> Iterator[np.ndarray]:
        yield table
        for array in (rows, ids) if job.with_ids else (rows,):
            for begin in range(0, len(order), step):
                yield array[order[begin : begin + step]]

    with naming(path):
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            for piece in pieces():
                content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                put_all(file.fileno(), content)
                sha.update(content)
                size += len(content)
        # Not flushed to the device: what a power cut takes from it, its digest tells.
        temporary.replace(path)
    return {"files": {job.relative(path): sha.hexdigest()}, "bytes": size, "rows": len(order)}


def gather_shard(job: Job, output: int, shard: int) -> Noted:
    """One shard from its parts of all runs: the second half of the shuffle."""
    layout = job.layouts[output]
    low, high = layout.bounds(shard)
    order = np.argsort(job.permutation(output).inverse(np.arange(low, high)))
    # Row i of the shard is the `position[i]`-th of its rows in the order of the source.
    position: np.ndarray = np.empty(high - low, np.int64)
    position[order] = np.arange(high - low)
    bucket = job.bucket(output) + shard
    rows: np.ndarray = np.empty((high - low, *layout.shape[1:]), np.dtype(layout.dtype))
    ids: np.ndarray = np.empty(high - low if job.with_ids else 0, np.int64)
    filled = 0
    for run in range(job.n_runs):
        filled += _read_run(job, job.run(run), bucket, rows[filled:], ids[filled:])
    if filled != high - low:
        raise DamagedFileError(
            f"{job.folder}/runs: hold {filled} rows for shard {shard} and not {high - low}; start over with --fresh"
        )
    step = max(1, _SLICE_BYTES // layout.row_bytes)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, high - low, step):
            part = position[begin : begin + step]
            yield rows[part], ids[part] if job.with_ids else ids

    return write_pieces(job, output, shard, pieces())


def _read_run(job: Job, path: Path, bucket: int, rows: np.ndarray, ids: np.ndarray) -> int:
    """The rows of a bucket into the beginning of ``rows``, and how many they are."""
    header, row_bytes = 8 * (job.bucket(len(job.layouts)) + 1), job.layouts[TRAIN].row_bytes
    with naming(path), path.open("rb", buffering=0) as file:
        begin, end = map(int, np.frombuffer(os.pread(file.fileno(), 16, 8 * bucket), np.int64))
        count = min(end - begin, len(rows))
        _fill(file.fileno(), rows[:count], header + begin * row_bytes)
        if job.with_ids:
            total = int.from_bytes(os.pread(file.fileno(), 8, header - 8), "little")
            _fill(file.fileno(), ids[:count], header + total * row_bytes + 8 * begin)
    return count


def _fill(descriptor: int, array: np.ndarray, offset: int) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8).data)
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError(5, "a run of the shuffle ends early; start over with --fresh")
        view, offset = view[count:], offset + count
