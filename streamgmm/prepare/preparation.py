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
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamgmm.errors import DataError, RequestError
from streamgmm.io.sources import Source
from streamgmm.prepare.identifiers import Identifiers, identifiers_of
from streamgmm.prepare.inputs import Partitions, Reference, resolve, save_part, staged_path
from streamgmm.prepare.job import OUTPUTS, Job
from streamgmm.prepare.learning import learn, prepared_dtype
from streamgmm.prepare.memory import RUN_BYTES, STAGING_COPIES, Needs, rows_at_once, workers_within
from streamgmm.prepare.production import Production, shared, task
from streamgmm.prepare.request import PrepareRequest, chosen, sibling
from streamgmm.prepare.result import Prepared, PrepareProgress, Silent, finished
from streamgmm.prepare.scheduling import Scheduler, open_scheduler
from streamgmm.prepare.selection import HELD_OUT, TRAIN
from streamgmm.prepare.shards import Layout, create_array
from streamgmm.prepare.shuffling import gather_shard, write_run
from streamgmm.prepare.steps import FULL
from streamgmm.prepare.workspace import MANIFEST, Workspace, check_room
from streamgmm.prepare.writing import write_shard
from streamgmm.storage import write_atomic
from streamgmm.transforms import FILE, granule_rows


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
    found = resolve(data, request.columns, request.id_column)
    identity = request.identity(_fingerprint(found))
    _check_destination(data, destination)
    with closing(Workspace(destination, fresh=fresh)) as workspace:
        already = finished(targets, identity, fresh=fresh)
        if already is not None:
            return already
        with closing(open_scheduler(request.scheduler)) as scheduler:
            return _Preparation(request, Production(scheduler, workspace, progress or Silent()), targets, identity).run(
                found
            )


class _Preparation:
    """The stages, in order, over what they share."""

    def __init__(
        self,
        request: PrepareRequest,
        production: Production,
        targets: Mapping[str, Path],
        identity: Mapping[str, object],
    ) -> None:
        self._request, self._production, self._targets, self._identity = request, production, targets, identity
        self._scheduler: Scheduler = production.scheduler
        self._workspace: Workspace = production.workspace
        self._folder = production.folder

    def run(self, found: Reference | Partitions) -> Prepared:
        """Every stage; what an earlier call finished is compared with its digest and kept."""
        begun, request, apart = time.perf_counter(), self._request, not self._scheduler.shares_memory
        if self._scheduler.dashboard:
            self._production.progress.tell(f"the scheduler's dashboard: {self._scheduler.dashboard}")
        if isinstance(found, Reference):
            # Before anything is begun.
            self._check(found.open())
            if apart:
                found.travelling()
        self._workspace.begin(self._identity)
        reference, identifiers = (found, None) if isinstance(found, Reference) else self._staged(found)
        source = reference.open()
        self._check(source)
        needs, workers = self._plan(source)
        job = Job(reference.travelling() if apart else reference, self._folder)
        learnt = learn(job, source, request, self._production)
        transformation, ranks = learnt.transformation, learnt.ranks
        outputs = (TRAIN, HELD_OUT) if request.holdout else (TRAIN,)
        layouts = tuple(
            Layout.of(
                (ranks.total(output), transformation.n_features_out), transformation.dtype.name, request.shard_bytes
            )
            for output in outputs
        )
        _check_rows(layouts, source.name, request)
        run_rows = rows_at_once(RUN_BYTES, layouts[TRAIN].row_bytes, learnt.recipe.granule)
        job = replace(
            job,
            recipe=learnt.recipe,
            transformation=transformation,
            ranks=ranks,
            layouts=layouts,
            with_ids=request.ids,
            identifiers=identifiers,
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
            stages=self._production.seconds,
            workers=workers,
            needed_bytes=needs,
        )
        source.close()
        self._publish(job, result)
        return replace(result, seconds=time.perf_counter() - begun)

    def _staged(self, found: Partitions) -> tuple[Reference, Identifiers | None]:
        """The partitions of a collection, each computed once and kept in a file, and what their rows are called."""
        # A part, the rows it becomes, and what its graph holds meanwhile.
        self._work_within(STAGING_COPIES * found.largest)
        names = {staged_path("", part).as_posix(): part for part in range(len(found.parts))}
        try:
            save = {
                name: task(save_part, found.parts[part], found.to_rows, self._folder, part, found.to_ids)
                for name, part in names.items()
            }
            self._production.make("staging", save)
        except (MemoryError, OSError, RequestError):
            raise
        # The graph runs whatever its author put in it.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"{found.name}: a partition cannot be computed ({reason}); check its inputs") from error
        filled = [name for name in names if self._workspace.done[name]["rows"]]
        if not filled:
            raise DataError(f"{found.name}: holds no rows; give at least one")
        paths = [Path(self._folder, name) for name in filled]
        rows = [int(self._workspace.done[name]["rows"]) for name in filled]
        identifiers = None if found.to_ids is None else identifiers_of(paths, rows)
        return Reference.of_paths([str(path) for path in paths]), identifiers

    def _check(self, source: Source) -> None:
        """See that the steps can be taken, before anything is read."""
        if source.transformation is not None and source.transformation.changes_values:
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
            row_bytes = widths[-1] * prepared_dtype(source, request).itemsize
            needs = needs.with_shuffle(row_bytes, request.shard_bytes, source.shape[0])
        workers = self._work_within(needs.task)
        return workers * needs.task, workers

    def _work_within(self, needed: int) -> int:
        """Tasks that work at once, where each holds ``needed`` bytes; on a cluster that is its own affair."""
        wanted = self._request.workers or len(os.sched_getaffinity(0))
        if not self._scheduler.is_local:
            return wanted
        workers = workers_within(needed, self._request.memory, wanted)
        self._scheduler.limit(workers)
        return workers

    def _write(self, job: Job) -> None:
        """Every shard of every output."""
        self._check_room(job)
        assert job.transformation is not None
        for output, layout in enumerate(job.layouts):
            about = {"output": OUTPUTS[output], **job.transformation.facts, "digest": job.transformation.digest}
            # Shards of an earlier call stay; the same request gives the same metadata.
            create_array(Path(self._folder, OUTPUTS[output]), layout, {"streamgmm": about})
            if job.with_ids:
                create_array(Path(self._folder, f"{OUTPUTS[output]}.ids"), job.ids_layout(output), {})
        sent, work = shared(job), write_shard
        if job.shuffle is not None:
            work = gather_shard
            runs = range(job.n_runs)
            self._production.make("sorting", {job.relative(job.run(run)): task(write_run, sent, run) for run in runs})
        shards = [(output, shard) for output, each in enumerate(job.layouts) for shard in range(each.n_shards)]
        self._production.make("writing", {job.relative(job.shard(*each)): task(work, sent, *each) for each in shards})

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

    def _publish(self, job: Job, result: Prepared) -> None:
        """Describe each array beside its shards, and give them their names, the destination's last."""
        assert job.transformation is not None
        for output, layout in enumerate(job.layouts):
            folder = Path(self._folder, OUTPUTS[output])
            job.transformation.save(folder / FILE)
            shards = [self._production.noted(job.shard(output, each)) for each in range(layout.n_shards)]
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
