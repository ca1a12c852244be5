"""Work spread over threads whose results are taken in order, so that their number never changes a bit."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from threading import Lock, local
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

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


class _OneBlasThread:
    """A context that any number of threads may be in; the first sets the limit and the last lifts it."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit = _blas().limit(limits=1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.restore_original_limits()


one_blas_thread = _OneBlasThread()
"""Within it NumPy's matrix products use one thread: at odd widths their bits depend on how many share them."""


@lru_cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory of this thread, of ``like``'s type and device: the same at every call with these arguments.

    Fresh memory for every tile would cost a page fault every 4 KiB, a tenth of the E-step's time.
    """
    kept: dict[Any, Tensor] = _local.__dict__
    key = (name, like.dtype, like.device)
    size = prod(shape)
    if key not in kept or kept[key].numel() < size:
        kept[key] = like.new_empty(size)
    return kept[key][:size].view(shape)


_local = local()


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "streamgmm-tile", initializer=_set_up)


# A forked child inherits the pool and none of its threads: work given to it would never be done.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _set_up() -> None:
    # A thread takes over the process's number at its first operation, unless it has asked for it before.
    torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
