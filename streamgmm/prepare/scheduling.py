"""Dask runs the tasks: on threads or processes of this machine, or on a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import dask
from dask.callbacks import Callback

from streamgmm.cluster.connecting import check_workers, open_client

if TYPE_CHECKING:
    from dask.delayed import Delayed

Done = Callable[[str, Any], None]
"""Of a task's name and its result, in this thread, as soon as it is there."""


class Scheduler(ABC):
    """Runs tasks that do not depend on one another."""

    shares_memory = False
    is_local = False
    dashboard = ""

    @abstractmethod
    def run(self, tasks: Mapping[str, Delayed], done: Done) -> None:
        """Compute all; the first error is raised, and tasks not begun are given up."""

    def limit(self, workers: int) -> None:  # noqa: B027 - a cluster has the workers it has
        """Work on as many tasks at once."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of workers."""


class _Local(Scheduler):
    is_local = True

    def __init__(self, kind: str) -> None:
        self._kind, self._workers = kind, 1
        self.shares_memory = kind == "threads"
        self._pool: Executor | None = None

    def limit(self, workers: int) -> None:
        if workers != self._workers:
            self.close()
        self._workers = workers

    def _opened_pool(self) -> Executor:
        # One for all stages: a process takes seconds to import what it needs, and spawned it shares no thread or lock.
        if self._pool is None:
            threads = self._kind == "threads"
            context = get_context("spawn")
            pool = ThreadPoolExecutor if threads else partial(ProcessPoolExecutor, mp_context=context)
            self._pool = pool(self._workers)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def run(self, tasks: Mapping[str, Delayed], done: Done) -> None:
        if not tasks:
            return
        names = {task.key: name for name, task in tasks.items()}

        def noted(key: Any, result: Any, *_: object) -> None:
            if key in names:
                done(names[key], result)

        with Callback(posttask=noted):
            pool = self._opened_pool()
            dask.compute(
                *tasks.values(), scheduler=self._kind, pool=pool, num_workers=self._workers, optimize_graph=False
            )


class _Cluster(Scheduler):
    def __init__(self, client: Any) -> None:
        self._client = client
        self.dashboard = str(client.dashboard_link or "")

    def run(self, tasks: Mapping[str, Delayed], done: Done) -> None:
        from distributed import as_completed

        if not tasks:
            return
        futures = self._client.compute(list(tasks.values()), optimize_graph=False)
        names = {future.key: name for future, name in zip(futures, tasks, strict=True)}
        try:
            for future in as_completed(futures, loop=self._client.loop):
                done(names[future.key], future.result())
        except BaseException:
            with suppress(Exception):
                self._client.cancel(futures)
            raise


class _OwnCluster(_Cluster):
    def close(self) -> None:
        self._client.close()


def open_scheduler(address: Any) -> Scheduler:
    """``threads``, ``processes``, the address of a Dask scheduler, or a `distributed.Client`.

    Raises
    ------
    RequestError
        No scheduler answers there, it has no workers, or they lack this package.
    """
    if address in ("threads", "processes"):
        return _Local(address)
    client = open_client(address)
    own = client is not address
    try:
        check_workers(client, "streamgmm.prepare.job")
    except BaseException:
        if own:
            client.close()
        raise
    return _OwnCluster(client) if own else _Cluster(client)
