"""From vectors as they come to shards as the loader wants them.

::

    source ──► (staged) ──► surveys ──► transformation ──► (runs) ──► shards ──► published
               partitions   counts,     one for each step   sorted     gathered    renamed
               of Dask      moments     that must learn      by shard

Every arrow makes files in the workspace, one a task; a file that is there and whole is never made twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from dask.delayed import Delayed, delayed

from streamgmm.errors import DataError, RequestError
from streamgmm.io.bfloat16 import BFLOAT16
from streamgmm.io.sources import Source
from streamgmm.prepare.inputs import Partitions, Reference, resolve, save_part, staged_path
from streamgmm.prepare.job import (
    OUTPUTS,
    Job,
    Noted,
    Survey,
    gather_shard,
    is_whole,
    survey_path,
    survey_segment,
    write_run,
    write_shard,
)
from streamgmm.prepare.memory import RUN_BYTES, STAGING_COPIES, Needs, rows_at_once, workers_within
from streamgmm.prepare.moments import Moments
from streamgmm.prepare.request import PrepareRequest, chosen, sibling
from streamgmm.prepare.scheduling import Scheduler, open_scheduler
from streamgmm.prepare.selection import HELD_OUT, TRAIN, Ranks, Recipe
from streamgmm.prepare.shards import Layout, create_array
from streamgmm.prepare.steps import COLUMNS, FULL, NOTHING, Drop, Impute, Step
from streamgmm.prepare.workspace import MANIFEST, Workspace, check_room, free_name, read_manifest, refuse_other
from streamgmm.statistics import segment_bounds
from streamgmm.storage import load_tensors, write_atomic
from streamgmm.transforms import FILE, RowMap, Select, Transformation, granule_rows

Maker = Callable[[], Delayed]


class PrepareProgress(Protocol):
    """What a caller may want to see."""

    def stage(self, name: str, total: int) -> None:
        """``total`` tasks of a stage begin."""

    def advance(self) -> None:
        """One of them is done."""

    def tell(self, text: str) -> None:
        """Something worth a line."""


class _Silent:
    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def tell(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Prepared:
    """What a preparation made.

    Attributes
    ----------
    path, held_out, ids, held_out_ids : Path or None
        The arrays; None where they were not asked for.
    shape, held_out_shape : (N, d)
    n_source : int
        Rows of the source; those that are in neither array were dropped.
    transformation : Transformation
    resumed : bool
        Whether files of an earlier call were taken up.
    seconds, stages : float, dict of str to float
        Of this call.
    workers, needed_bytes : int
        Tasks at once, and what they may hold together.
    """

    path: Path
    held_out: Path | None
    ids: Path | None
    held_out_ids: Path | None
    shape: tuple[int, int]
    held_out_shape: tuple[int, int]
    n_source: int
    transformation: Transformation
    resumed: bool
    seconds: float = 0.0
    stages: Mapping[str, float] | None = None
    workers: int = 0
    needed_bytes: int = 0

    @property
    def facts(self) -> dict[str, object]:
        """JSON values."""
        rows, held = self.shape[0], self.held_out_shape[0]
        size = (rows + held) * self.shape[1] * self.transformation.dtype.itemsize
        return {
            "n_samples": rows,
            "n_features": self.shape[1],
            "n_held_out": held,
            "n_source": self.n_source,
            "n_dropped": self.n_source - rows - held,
            "dtype": self.transformation.dtype.name,
            "bytes": size,
            "written": [str(each) for each in (self.path, self.held_out, self.ids, self.held_out_ids) if each],
            "transformation": self.transformation.digest,
            "steps": list(self.transformation.steps),
            "seconds": self.seconds,
            "stages": dict(self.stages or {}),
            "workers": self.workers,
            "needed_bytes": self.needed_bytes,
            "resumed": self.resumed,
        }


def run_preparation(
    data: Any,
    destination: Path,
    request: PrepareRequest,
    progress: PrepareProgress | None = None,
    *,
    fresh: bool = False,
) -> Prepared:
    """Prepare ``data`` as ``request`` says; raises as `prepare`."""
    targets = _targets(destination, request)
    found = resolve(data, request.columns)
    identity = request.identity(_fingerprint(found))
    _check_destination(data, destination)
    with closing(Workspace(destination, fresh=fresh)) as workspace:
        finished = _finished(targets, identity, fresh=fresh)
        if finished is not None:
            return finished
        with closing(open_scheduler(request.scheduler)) as scheduler:
            return _Preparation(request, scheduler, workspace, targets, identity, progress).run(found)


class _Preparation:
    """The stages, in order, over what they share."""

    def __init__(
        self,
        request: PrepareRequest,
        scheduler: Scheduler,
        workspace: Workspace,
        targets: Mapping[str, Path],
        identity: Mapping[str, object],
        progress: PrepareProgress | None,
    ) -> None:
        self._request, self._scheduler, self._workspace = request, scheduler, workspace
        self._targets, self._identity = targets, identity
        self._progress = progress or _Silent()
        self._folder = str(workspace.path.absolute())
        self._seconds: dict[str, float] = {}
        self._surveys = 0

    def run(self, found: Reference | Partitions) -> Prepared:
        """Every stage; what an earlier call finished is compared with its digest and kept."""
        begun, request, apart = time.perf_counter(), self._request, not self._scheduler.shares_memory
        if self._scheduler.dashboard:
            self._progress.tell(f"the scheduler's dashboard: {self._scheduler.dashboard}")
        if isinstance(found, Reference):
            # Before anything is begun.
            self._check(found.open())
            if apart:
                found.travelling()
        self._workspace.begin(self._identity)
        reference = found if isinstance(found, Reference) else self._staged(found)
        source = reference.open()
        self._check(source)
        needs, workers = self._plan(source)
        job = Job(reference.travelling() if apart else reference, self._folder, apart=apart)
        recipe, transformation, ranks = self._learned(job, source)
        outputs = (TRAIN, HELD_OUT) if request.holdout else (TRAIN,)
        layouts = tuple(
            Layout.of(
                (ranks.total(output), transformation.n_features_out), transformation.dtype.name, request.shard_bytes
            )
            for output in outputs
        )
        _check_rows(layouts, source.name, request)
        run_rows = rows_at_once(RUN_BYTES, layouts[TRAIN].row_bytes, recipe.granule)
        job = replace(
            job,
            recipe=recipe,
            transformation=transformation,
            ranks=ranks,
            layouts=layouts,
            with_ids=request.ids,
            shuffle=request.seed if request.shuffle else None,
            run_rows=run_rows,
        )
        self._write(job)
        result = Prepared(
            path=self._targets["rows"],
            held_out=self._targets.get("held-out"),
            ids=self._targets.get("rows.ids"),
            held_out_ids=self._targets.get("held-out.ids"),
            shape=(layouts[TRAIN].shape[0], transformation.n_features_out),
            held_out_shape=(layouts[-1].shape[0] if request.holdout else 0, transformation.n_features_out),
            n_source=source.shape[0],
            transformation=transformation,
            resumed=self._workspace.resumed,
            seconds=time.perf_counter() - begun,
            stages=self._seconds,
            workers=workers,
            needed_bytes=needs,
        )
        source.close()
        self._publish(job, result)
        return replace(result, seconds=time.perf_counter() - begun)

    def _staged(self, found: Partitions) -> Reference:
        """The partitions of a collection, each computed once and kept in a file."""

        def maker(part: int) -> Maker:
            return lambda: delayed(save_part, pure=False)(found.parts[part], found.to_rows, self._folder, part)

        # A part, the rows it becomes, and what its graph holds meanwhile.
        workers = workers_within(STAGING_COPIES * found.largest, self._request.memory, self._wanted)
        self._scheduler.limit(workers)
        names = {staged_path("", part).as_posix(): part for part in range(len(found.parts))}
        try:
            self._produce("staging", {name: maker(part) for name, part in names.items()})
        except (MemoryError, OSError, RequestError):
            raise
        # The graph runs whatever its author put in it.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"{found.name}: a partition cannot be computed ({reason}); check its inputs") from error
        filled = [name for name in names if self._workspace.done[name]["rows"]]
        if not filled:
            raise DataError(f"{found.name}: holds no rows; give at least one")
        return Reference.of_paths([str(Path(self._folder, name)) for name in filled])

    def _check(self, source: Source) -> None:
        """See that the steps can be taken, before anything is read."""
        if source.transformation is not None:
            raise DataError(
                f"{source.name}: was prepared already; prepare what it was made from, with all steps at once"
            )
        columns = chosen(self._request.columns, source.shape[1], source.name)
        width = source.shape[1] if columns is None else len(columns)
        for step in self._request.steps:
            width = step.n_out(width)

    def _plan(self, source: Source) -> tuple[int, int]:
        """Bytes that all tasks may hold together, and how many work at once."""
        request = self._request
        columns = chosen(request.columns, source.shape[1], source.name)
        widths = [source.shape[1] if columns is None else len(columns)]
        for step in request.steps:
            widths.append(step.n_out(widths[-1]))
        full = any(step.needs == FULL for step in request.steps)
        needs = Needs.of(source, max(widths), granule_rows(source.shape[1]), full=full)
        if request.shuffle:
            row_bytes = widths[-1] * self._dtype(source).itemsize
            needs = needs.with_shuffle(row_bytes, request.shard_bytes, source.shape[0])
        workers = workers_within(needs.task, request.memory, self._wanted)
        self._scheduler.limit(workers)
        return workers * needs.task, workers

    @property
    def _wanted(self) -> int:
        """Tasks at once, where memory allows them."""
        return self._request.workers or len(os.sched_getaffinity(0))

    def _dtype(self, source: Source) -> np.dtype[np.generic]:
        """Of the prepared rows."""
        if self._request.dtype is not None:
            return np.dtype(self._request.dtype)
        return source.dtype if self._as_stored(source) else np.dtype(np.float32)

    def _as_stored(self, source: Source) -> bool:
        """Whether values are neither computed nor converted."""
        same = source.dtype != BFLOAT16 and self._request.dtype in (None, source.dtype.name)
        return same and all(isinstance(step, Drop) for step in self._request.steps)

    def _learned(self, job: Job, source: Source) -> tuple[Recipe, Transformation, Ranks]:
        """The maps, each learnt from the rows as the maps before it leave them, in as few passes as that takes."""
        request, granule = self._request, granule_rows(source.shape[1])
        columns = chosen(request.columns, source.shape[1], source.name)
        items: list[RowMap | Drop] = [] if columns is None else [Select(columns)]
        width = source.shape[1] if columns is None else len(columns)
        moments: Moments | None = None
        counts: np.ndarray | None = None

        def recipe() -> Recipe:
            return Recipe(tuple(items), granule, request.holdout, request.seed)

        def survey(needs: str, *, lenient: bool = False) -> Moments | None:
            nonlocal counts
            counts, found = self._survey(job, source, recipe(), needs, lenient=lenient)
            return found

        for index, step in enumerate(request.steps):
            if isinstance(step, Drop):
                items.append(step)
                moments = counts = None
                continue
            if step.needs != NOTHING and (moments is None or (step.needs == FULL and moments.scatter.ndim == 1)):
                moments = survey(_needs(request.steps[index:]), lenient=isinstance(step, Impute))
            each = step.fit(width, moments)
            items.append(each)
            width = step.n_out(width)
            moments = moments.through(each) if moments is not None and step.linear else None
        dtype, quantum = self._dtype(source), 1.0
        if dtype == np.int8 and not self._as_stored(source):
            if moments is None or not np.isfinite(moments.largest):
                moments = survey(COLUMNS)
            assert moments is not None
            quantum = moments.largest / 127 or 1.0
        if recipe().selects and counts is None:
            survey(NOTHING)
        maps = tuple(item for item in items if isinstance(item, RowMap))
        texts = tuple(step.text for step in request.steps)
        transformation = Transformation(source.shape[1], maps, dtype, quantum, texts)
        ranks = Ranks(source.shape[0], granule)
        if recipe().selects:
            assert counts is not None
            ranks = Ranks.counted(source.shape[0], granule, counts)
        return recipe(), transformation, ranks

    def _survey(
        self, job: Job, source: Source, recipe: Recipe, needs: str, *, lenient: bool
    ) -> tuple[np.ndarray, Moments | None]:
        """Rows of each granule for each output, and moments of the training rows, joined in the order of the rows."""
        name = f"survey-{self._surveys}"
        self._surveys += 1
        job = replace(job, survey=Survey(name, recipe, needs, lenient))
        shared = _shared(job)

        def maker(segment: int) -> Maker:
            return lambda: delayed(survey_segment, pure=False)(shared, segment)

        bounds = enumerate(segment_bounds(source.shape[0]))
        segments = [segment for segment, (start, stop) in bounds if start < stop]
        self._produce(name, {survey_path("", name, each).as_posix(): maker(each) for each in segments})
        counts, total = [], None
        for segment in segments:
            tensors, _ = load_tensors(survey_path(self._folder, name, segment))
            counts.append(tensors.pop("rows"))
            if tensors:
                moments = Moments.from_tensors(tensors)
                total = moments if total is None else total + moments
        return np.concatenate(counts), total

    def _write(self, job: Job) -> None:
        """Every shard of every output."""
        shuffled = job.shuffle is not None
        self._check_room(job)
        assert job.transformation is not None
        for output, layout in enumerate(job.layouts):
            about = {"output": OUTPUTS[output], **job.transformation.facts, "digest": job.transformation.digest}
            self._create(OUTPUTS[output], layout, {"streamgmm": about})
            if job.with_ids:
                self._create(f"{OUTPUTS[output]}.ids", job.ids_layout(output), {})
        shared = _shared(job)
        if shuffled:

            def run_maker(run: int) -> Maker:
                return lambda: delayed(write_run, pure=False)(shared, run)

            self._produce("sorting", {self._relative(job.run(run)): run_maker(run) for run in range(job.n_runs)})

        def maker(output: int, shard: int) -> Maker:
            work = gather_shard if shuffled else write_shard
            return lambda: delayed(work, pure=False)(shared, output, shard)

        shards = [(output, shard) for output, each in enumerate(job.layouts) for shard in range(each.n_shards)]
        self._produce("writing", {self._relative(job.shard(*each)): maker(*each) for each in shards})

    def _create(self, name: str, layout: Layout, attributes: dict[str, object]) -> None:
        # The shards of an earlier call stay; the same request gives the same metadata.
        if not Path(self._folder, name, "zarr.json").exists():
            create_array(Path(self._folder, name), layout, attributes)

    def _check_room(self, job: Job) -> None:
        size = sum(layout.stored_bytes() for layout in job.layouts)
        if job.with_ids:
            size += sum(job.ids_layout(output).stored_bytes() for output in range(len(job.layouts)))
        size *= 2 if job.shuffle is not None else 1
        there = sum(
            facts["bytes"] for name, facts in self._workspace.done.items() if name.startswith(("rows", "held", "runs"))
        )
        check_room(
            self._workspace.path, size - there, f"{size:,} bytes are to be written, {there:,} of them are there,"
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _produce(self, stage: str, makers: Mapping[str, Maker]) -> None:
        """Make every file that is not there, or is there but no longer what the journal notes."""
        begun, workspace = time.perf_counter(), self._workspace
        kept = {name: workspace.done[name]["files"] for name in makers if name in workspace.done}

        def compared(name: str, whole: bool) -> None:
            if not whole:
                workspace.forget(name)
                self._progress.tell(f"{workspace.path / name}: is not as it was written; it is made again")
            self._progress.advance()

        def made(name: str, facts: Noted) -> None:
            workspace.note(name, facts)
            self._progress.advance()

        if kept:
            self._progress.stage(f"comparing {stage}", len(kept))
            self._scheduler.run(
                {
                    name: delayed(is_whole, pure=False)(self._folder, list(map(list, files.items())))
                    for name, files in kept.items()
                },
                compared,
            )
        missing = {name: make() for name, make in makers.items() if name not in workspace.done}
        self._progress.stage(stage, len(missing))
        self._scheduler.run(missing, made)
        self._seconds[stage] = time.perf_counter() - begun

    def _publish(self, job: Job, result: Prepared) -> None:
        """Describe each array beside its shards, and give them their names, the destination's last."""
        assert job.transformation is not None
        for output, layout in enumerate(job.layouts):
            folder = Path(self._folder, OUTPUTS[output])
            job.transformation.save(folder / FILE)
            shards = [self._workspace.done[self._relative(job.shard(output, each))] for each in range(layout.n_shards)]
            manifest = {
                "format": "streamgmm-prepared",
                "version": 1,
                "output": OUTPUTS[output],
                "identity": dict(self._identity),
                "result": result.facts,
                "shape": layout.shape,
                "dtype": layout.dtype,
                "chunk_rows": layout.chunk_rows,
                "shard_rows": layout.shard_rows,
                "shards": {layout.key(each): facts["files"] for each, facts in enumerate(shards)},
            }
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        os.sync()
        order = sorted(self._targets, key=lambda name: name == "rows")
        self._workspace.publish({name: self._targets[name] for name in order})


def _shared(job: Job) -> Delayed:
    """A job as one node of the graph, which reaches each worker once."""
    return delayed(job, pure=False, traverse=False)


def _needs(steps: tuple[Step, ...]) -> str:
    """What a survey before ``steps`` must find out so that as many of them as possible learn from it."""
    linear = 1 if not steps[0].linear else next((i for i, step in enumerate(steps) if not step.linear), len(steps))
    learning = [index for index in range(linear) if steps[index].needs != NOTHING]
    before = steps[: learning[-1] + 1]
    # Moments pass through a projection only with the whole covariance.
    return FULL if any(step.needs == FULL or (step.linear and step.needs == NOTHING) for step in before) else COLUMNS


def _targets(destination: Path, request: PrepareRequest) -> dict[str, Path]:
    """Where each array goes, by its folder in the workspace."""
    if destination.suffix != ".zarr":
        raise RequestError(f"{destination}: rows are prepared to a Zarr array; give a destination that ends in .zarr")
    found = {"rows": destination}
    if request.ids:
        found["rows.ids"] = sibling(destination, "ids")
    if request.holdout:
        found["held-out"] = sibling(destination, "held-out")
        if request.ids:
            found["held-out.ids"] = sibling(destination, "held-out.ids")
    return found


def _fingerprint(found: Reference | Partitions) -> str:
    return found.fingerprint if isinstance(found, Partitions) else found.open().fingerprint


def _check_rows(layouts: tuple[Layout, ...], name: str, request: PrepareRequest) -> None:
    if layouts[TRAIN].shape[0] == 0:
        raise DataError(f"{name}: no row is left; every one holds NaN or infinity, or is held out")
    if layouts[-1].shape[0] == 0:
        raise RequestError(
            f"holdout {request.holdout} holds out none of the {layouts[TRAIN].shape[0]:,} rows; raise it"
        )


def _check_destination(data: Any, destination: Path) -> None:
    """Refuse to replace the data by what is made of it."""
    items = data if isinstance(data, (list, tuple)) else [data]
    for item in items:
        if isinstance(item, (str, os.PathLike)) and Path(os.fsdecode(item)).resolve() == destination.resolve():
            raise RequestError(f"{destination}: is the data itself; name another destination")


def _finished(targets: Mapping[str, Path], identity: Mapping[str, object], *, fresh: bool) -> Prepared | None:
    """What is at the destination already, where it is what is asked for; with ``fresh`` it is moved aside."""
    there = [target for target in targets.values() if target.exists()]
    destination = targets["rows"]
    if not there:
        return None
    manifest = read_manifest(destination)
    complete = len(there) == len(targets)
    if manifest is None or not (complete or fresh):
        raise RequestError(f"{there[0]}: exists and is not this preparation's; remove it, or name another destination")
    if fresh:
        for target in there:
            target.rename(free_name(target))
        return None
    refuse_other(destination, manifest["identity"], identity)
    facts = manifest["result"]
    return Prepared(
        path=destination,
        held_out=targets.get("held-out"),
        ids=targets.get("rows.ids"),
        held_out_ids=targets.get("held-out.ids"),
        shape=(facts["n_samples"], facts["n_features"]),
        held_out_shape=(facts["n_held_out"], facts["n_features"]),
        n_source=facts["n_source"],
        transformation=Transformation.load(destination / FILE),
        resumed=True,
    )
