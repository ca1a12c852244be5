"""The row work, as functions that each make one file; whoever runs them, wherever, in any order.

A `Job` is all that they share. Each gives what the journal notes of its file: SHA-256, bytes, rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DamagedFileError
from streamgmm.io.sources import Source
from streamgmm.prepare.inputs import Reference
from streamgmm.prepare.moments import Moments
from streamgmm.prepare.permutation import Permutation
from streamgmm.prepare.scheduling import alone_on_its_core
from streamgmm.prepare.selection import TRAIN, Ranks, Recipe, check_finite, stored
from streamgmm.prepare.shards import Layout, ShardWriter, digest_of, put_all, temporary_name
from streamgmm.prepare.steps import FULL, NOTHING
from streamgmm.statistics import segment_bounds
from streamgmm.storage import naming, save_tensors
from streamgmm.transforms import Transformation

Noted = dict[str, Any]

OUTPUTS = ("rows", "held-out")
"""Folders of the arrays, by output; their row numbers lie in ``rows.ids`` and ``held-out.ids``."""

_SLICE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Survey:
    """What a pass over the rows is to find out: how many there are for each output, and moments of the training rows.

    Attributes
    ----------
    name : str
        Of its folder.
    recipe : Recipe
        What is known of the way so far.
    needs : str
        `NOTHING` but counts, `COLUMNS`, or `FULL`.
    lenient : bool
        Whether values that are not finite may be there.
    """

    name: str
    recipe: Recipe
    needs: str
    lenient: bool


@dataclass(frozen=True, eq=False)
class Job:
    """What the tasks of one preparation share, once it is known; small enough to be sent to every worker."""

    reference: Reference
    folder: str
    survey: Survey | None = None
    recipe: Recipe | None = None
    transformation: Transformation | None = None
    ranks: Ranks | None = None
    layouts: tuple[Layout, ...] = ()
    with_ids: bool = False
    shuffle: int | None = None
    """Seed of the permutation."""
    run_rows: int = 0
    apart: bool = False
    """Whether tasks run in other processes than the one that made this."""

    def source(self) -> Source:
        """The rows, for a task that is about to compute."""
        if self.apart:
            alone_on_its_core()
        return self.reference.open()

    def shard(self, output: int, shard: int) -> Path:
        return Path(self.folder, OUTPUTS[output], self.layouts[output].key(shard))

    def ids_layout(self, output: int) -> Layout:
        rows = self.layouts[output]
        return Layout(rows.shape[:1], "int64", rows.chunk_rows, rows.shard_rows)

    def ids_shard(self, output: int, shard: int) -> Path:
        return Path(self.folder, f"{OUTPUTS[output]}.ids", self.ids_layout(output).key(shard))

    def run(self, run: int) -> Path:
        return Path(self.folder, "runs", f"{run:06d}.run")

    @property
    def n_runs(self) -> int:
        assert self.ranks is not None
        return -(-self.ranks.n_samples // self.run_rows)

    def bucket(self, output: int) -> int:
        """Number of the first shard of an output, those of all outputs counted."""
        return sum(layout.n_shards for layout in self.layouts[:output])

    def permutation(self, output: int) -> Permutation:
        assert self.shuffle is not None
        # The held-out rows are in an order of their own.
        return Permutation(self.layouts[output].shape[0], 2 * self.shuffle + output)


def survey_path(folder: str, name: str, segment: int) -> Path:
    return Path(folder, name, f"{segment:02d}.safetensors")


def survey_segment(job: Job, segment: int) -> Noted:
    """Counts and moments of one of the 64 segments, summed in row order."""
    survey = job.survey
    assert survey is not None
    start, stop = segment_bounds(job.reference.open().shape[0])[segment]
    path = survey_path(job.folder, survey.name, segment)
    path.parent.mkdir(exist_ok=True)
    if survey.needs == NOTHING and not survey.recipe.drops:
        save_tensors(path, {"rows": _counts(list(survey.recipe.counts(start, stop)))}, {})
        return noted(job.folder, path, stop - start)
    source, counts, total = job.source(), [], None
    for granule in survey.recipe.granules(source, start, stop):
        train, held = granule.masks
        counts.append((int(train.sum()), int(held.sum())))
        if survey.needs == NOTHING:
            continue
        if not survey.lenient:
            check_finite(source, granule, train)
        moments = Moments.of(granule.rows[train].astype(np.float64, copy=False), full=survey.needs == FULL)
        total = moments if total is None else total + moments
    tensors = {} if total is None else total.tensors()
    save_tensors(path, {"rows": _counts(counts), **tensors}, {})
    return noted(job.folder, path, stop - start)


def _counts(counts: list[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(counts, dtype=np.int64).reshape(-1, 2)


def write_shard(job: Job, output: int, shard: int) -> Noted:
    """One shard of rows, and its row numbers where they are wanted, in the order of the source."""
    assert job.recipe is not None
    assert job.ranks is not None
    source = job.source()
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
                yield stored(source, granule, _compact(inside), job.transformation), granule.first + inside

    return _write(job, output, shard, pieces())


def _compact(numbers: NDArray[np.int64]) -> Any:
    """Consecutive ``numbers`` as a slice, which copies nothing."""
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    return slice(first, last) if last - first == len(numbers) else numbers


def _write(job: Job, output: int, shard: int, pieces: Iterator[tuple[np.ndarray, np.ndarray]]) -> Noted:
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
    files = {_name(job, job.shard(output, shard)): rows_to.digest}
    if ids_to is not None:
        files[_name(job, job.ids_shard(output, shard))] = ids_to.digest
    return {"files": files, "bytes": rows_to.size + (ids_to.size if ids_to is not None else 0), "rows": high - low}


def _name(job: Job, path: Path) -> str:
    return path.relative_to(job.folder).as_posix()


def write_run(job: Job, run: int) -> Noted:
    """The rows of a stretch of the source, sorted by the shard that they go to: the first half of the shuffle.

    The file holds where each shard's rows begin (int64, one more than there are shards), the rows, and their numbers
    where they are wanted. Rows for one shard stay in the order of the source.
    """
    assert job.recipe is not None
    assert job.ranks is not None
    assert job.transformation is not None
    source = job.source()
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
                rows[filled : filled + len(mine)] = stored(source, granule, _compact(mine), job.transformation)
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
            ids[where] = np.concatenate(numbers[output])
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
    return {"files": {_name(job, path): sha.hexdigest()}, "bytes": size, "rows": len(order)}


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

    return _write(job, output, shard, pieces())


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


def is_whole(folder: str, files: Sequence[tuple[str, str]]) -> bool:
    """Whether finished files are as the journal notes them: names in ``folder``, and their SHA-256."""
    try:
        return all(digest_of(Path(folder, name)) == digest for name, digest in files)
    except OSError:
        return False


def noted(folder: str, path: Path, rows: int) -> Noted:
    """What the journal notes of a file in ``folder``."""
    name = path.relative_to(folder).as_posix()
    return {"files": {name: digest_of(path)}, "bytes": path.stat().st_size, "rows": rows}
