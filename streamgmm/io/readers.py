"""Threads that read, and that a read which never returns cannot keep the process from ending."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias, TypeVar

Result = TypeVar("Result")

_LEAST_THREADS, _MOST_THREADS = 4, 12


def reader_threads() -> int:
    """How many threads read unless the user says: one a core, and no fewer than keep a disk's queue filled.

    Sixteen are slower: they wait for the interpreter instead of the page cache.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, _LEAST_THREADS), _MOST_THREADS)


_Task: TypeAlias = "tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None"


class Readers:
    """As `concurrent.futures.ThreadPoolExecutor`, with daemon threads: that one joins its threads at exit, for ever.

    A thread starts with the first task for it: small data in memory needs one.

    Attributes
    ----------
    most : int
        How many threads there are at most.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self.most = threads
        self._threads: list[Thread] = []
        self._closed = False

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Call ``function`` on one of the threads, after all that was submitted before has begun."""
        future: Future[Result] = Future()
        self._tasks.put((future, function, arguments))
        if len(self._threads) < self.most:
            name = f"streamgmm-read_{len(self._threads)}"
            self._threads.append(Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()
        return future

    def close(self, patience: float) -> bool:
        """Cancel what has not begun and wait ``patience`` seconds for the rest; whether every thread has ended."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # Else the last task's rows would live until the next one comes.
            del task, future, function, arguments
