"""Work spread over threads whose results are taken in order, so that their number never changes a bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function`` of each item, in order, on ``workers`` threads with at most one result a thread waiting.

    Each thread runs single-threaded BLAS: the bits of a product then cannot depend on how many cores share it. It
    flushes denormals: responsibilities below 1e-38 would slow every product tenfold and change none.
    """
    pool = _pool(workers)
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's operations in this thread: its own pool would spin against the workers' cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "streamgmm-tile", initializer=_set_up)


def _set_up() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
