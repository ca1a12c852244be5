"""Files are made by tasks, one each; what is there and whole is never made twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dask.delayed import Delayed, delayed

from streamgmm.prepare.job import Job, Noted, is_whole
from streamgmm.prepare.result import PrepareProgress
from streamgmm.prepare.scheduling import Scheduler
from streamgmm.prepare.workspace import Workspace

Maker = Callable[[], Delayed]


class Production:
    """A scheduler that makes files in a workspace.

    Attributes
    ----------
    folder : str
        Of the workspace, absolute.
    seconds : dict of str to float
        Time of each stage so far.
    """

    def __init__(self, scheduler: Scheduler, workspace: Workspace, progress: PrepareProgress) -> None:
        self.scheduler, self.workspace, self.progress = scheduler, workspace, progress
        self.folder = str(workspace.path.absolute())
        self.seconds: dict[str, float] = {}

    def make(self, stage: str, makers: Mapping[str, Maker]) -> None:
        """Every file, by its name in the workspace, that is not there, or is no longer what the journal notes."""
        begun, workspace, progress = time.perf_counter(), self.workspace, self.progress
        kept = {name: workspace.done[name]["files"] for name in makers if name in workspace.done}

        def compared(name: str, whole: bool) -> None:
            if not whole:
                workspace.forget(name)
                progress.tell(f"{workspace.path / name}: is not as it was written; it is made again")
            progress.advance()

        def made(name: str, facts: Noted) -> None:
            workspace.note(name, facts)
            progress.advance()

        if kept:
            progress.stage(f"comparing {stage}", len(kept))
            compare = delayed(is_whole, pure=False)
            self.scheduler.run(
                {name: compare(self.folder, [list(item) for item in files.items()]) for name, files in kept.items()},
                compared,
            )
        missing = {name: make() for name, make in makers.items() if name not in workspace.done}
        progress.stage(stage, len(missing))
        self.scheduler.run(missing, made)
        self.seconds[stage] = time.perf_counter() - begun

    def noted(self, path: Path) -> Noted:
        """What the journal notes of a finished file."""
        return self.workspace.done[path.relative_to(self.folder).as_posix()]


def shared(job: Job) -> Delayed:
    """A job as one node of the graph, which reaches each worker once."""
    return delayed(job, pure=False, traverse=False)


def task(function: Callable[..., Noted], *arguments: Any) -> Maker:
    """``function`` of ``arguments``, some of them Delayed, to be made a task where its file is missing."""
    return partial(delayed(function, pure=False), *arguments)
