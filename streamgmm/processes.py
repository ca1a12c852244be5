"""Processes linked by torch.distributed, as a `World`: those that ``torchrun`` started, or any that share a store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamgmm.distributed import ALONE, PATIENCE_SECONDS, Team, World
from streamgmm.errors import PeerLost, RequestError, StreamGMMError

if TYPE_CHECKING:
    from torch.distributed import Work
    from torch.distributed.distributed_c10d import Store

JOIN_SECONDS = 300.0
"""How long processes that start together wait for each other."""

_HEADER_BYTES = 8192
_LENGTH_BYTES = 8
_SHORTEST_NAP, _LONGEST_NAP = 2e-5, 2e-3
_SECONDS_BETWEEN_IDLES = 0.1


def launched() -> tuple[int, int]:
    """Rank and number of the processes that were started together; (0, 1) for one alone.

    Raises
    ------
    RequestError
        The launcher's variables contradict each other.
    """
    size = _variable("WORLD_SIZE", 1)
    rank = _variable("RANK", 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise RequestError(f"RANK is {rank} and WORLD_SIZE {size}; start the processes with torchrun")
    return rank, size


def join_world() -> World:
    """The world that this process was started in; to be used as a context.

    Raises
    ------
    RequestError
        The launcher's variables are incomplete.
    StreamGMMError
        The others cannot be reached.
    """
    rank, size = launched()
    if size == 1:
        return ALONE
    local_rank, local_size = _variable("LOCAL_RANK", rank), _variable("LOCAL_WORLD_SIZE", 1)
    with _finding(f"the {size} processes did not find each other", "check MASTER_ADDR and MASTER_PORT, or start them "
                  "with torchrun"):  # fmt: skip
        links = TorchLinks(_launched_store(size), rank, size)
    return Team(links, rank, size, local_rank, local_size)


def _variable(name: str, otherwise: int | None) -> int:
    text = os.environ.get(name, "" if otherwise is None else str(otherwise))
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"{name} must be a number; got {text!r}; start the processes with torchrun") from None


def _attempt(size: int) -> str:
    """How often torchrun has started these processes again: its store still holds what the earlier ones wrote.

    Between machines the count may differ, and the store is a new one.
    """
    one_machine = _variable("LOCAL_WORLD_SIZE", 1) == size
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"


def _launched_store(size: int) -> Store:
    """The launcher's store, once all processes have reached it."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))))
    return PrefixStore(f"streamgmm/{_attempt(size)}", store)


@contextmanager
def _finding(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise StreamGMMError(f"{what} ({str(error).splitlines()[0]}); {remedy}") from None


class TorchLinks:
    """Gloo for what lies in host memory, NCCL for what lies on a GPU, and a store for single numbers.

    Parameters
    ----------
    store : torch.distributed.Store
        That all ``size`` processes have reached.
    check : callable, optional
        Called now and then while this process waits for others; what it raises ends the wait.

    Raises
    ------
    RuntimeError, ValueError
        The processes cannot be linked.
    """

    def __init__(self, store: Store, rank: int, size: int, check: Callable[[], None] = lambda: None) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        self._dist, self._size, self._check = dist, size, check
        # Who loses another process is told in one line; NCCL's monitor would add its own, and stack traces.
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
        )
        self._numbers = PrefixStore("numbers", store)

    def exchange(self, text: bytes, idle: Callable[[], None], patience: float) -> list[bytes]:
        with _losing_touch():
            deadline = time.monotonic() + patience
            texts = self._all_gather(text[: _HEADER_BYTES - _LENGTH_BYTES], len(text), _HEADER_BYTES, idle, deadline)
            longest = max(length for length, _ in texts) + _LENGTH_BYTES
            if longest > _HEADER_BYTES:
                texts = self._all_gather(text, len(text), longest, idle, deadline)
            return [part[:length] for length, part in texts]

    def _all_gather(
        self, text: bytes, length: int, room: int, idle: Callable[[], None], deadline: float
    ) -> list[tuple[int, bytes]]:
        own = torch.zeros(room, dtype=torch.uint8)
        framed = length.to_bytes(_LENGTH_BYTES, "little") + text
        own[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        theirs = [torch.empty_like(own) for _ in range(self._size)]
        self._wait(self._dist.all_gather(theirs, own, async_op=True), idle, deadline)
        parts = (bytes(each.numpy()) for each in theirs)
        return [(int.from_bytes(part[:_LENGTH_BYTES], "little"), part[_LENGTH_BYTES:]) for part in parts]

    def send(self, tensor: Tensor) -> None:
        self._move(self._dist.isend, tensor, 0)

    def receive(self, tensor: Tensor, rank: int) -> None:
        self._move(self._dist.irecv, tensor, rank)

    def _move(self, operation: Callable[..., Any], tensor: Tensor, rank: int) -> None:
        with _losing_touch():
            # As a batch of one: by itself it would have NCCL link each pair of processes anew.
            for work in self._dist.batch_isend_irecv([self._dist.P2POp(operation, tensor, rank)]):
                work.wait()

    def spread(self, tensor: Tensor) -> None:
        with _losing_touch():
            deadline = time.monotonic() + PATIENCE_SECONDS
            self._wait(self._dist.broadcast(tensor, 0, async_op=True), lambda: None, deadline)

    def add(self, key: str, amount: int) -> int:
        with _losing_touch():
            return int(self._numbers.add(key, amount))

    def close(self) -> None:
        self._dist.destroy_process_group()

    def _wait(self, work: Work | None, idle: Callable[[], None], deadline: float) -> None:
        """Wait in Python, so that signals are heard and ``idle`` is called."""
        assert work is not None
        nap, next_idle = _SHORTEST_NAP, time.monotonic() + _SECONDS_BETWEEN_IDLES
        while not work.is_completed():
            now = time.monotonic()
            if now > deadline:
                raise PeerLost(_LOST.format("others did not come"))
            if now > next_idle:
                self._check()
                idle()
                next_idle = now + _SECONDS_BETWEEN_IDLES
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        work.wait()


_LOST = (
    "lost touch with another process of this run ({}); what was saved is intact: run the same command again, with any "
    "number of processes"
)


@contextmanager
def _losing_touch() -> Iterator[None]:
    """What torch raises when another process is gone, as `PeerLost`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(_LOST.format("it was killed, or its machine or network failed")) from error
