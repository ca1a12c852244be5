"""Several processes of a world as threads of one: exchanging through memory, and dying when a test wants them to."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from torch import Tensor

from streamgmm.distributed import ALONE, Team, World
from streamgmm.errors import PeerLost

Result = TypeVar("Result")


class Hub:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.texts: dict[int, bytes] = {}
        self.rounds: list[list[bytes]] = []
        self.numbers: dict[str, int] = defaultdict(int)
        self.queues: dict[tuple[int, int], SimpleQueue[Tensor]] = defaultdict(SimpleQueue)
        self.lost = False

    def lose(self) -> None:
        """A process is gone."""
        with self.changed:
            self.lost = True
            self.changed.notify_all()


class MemoryLinks:
    """One thread's `Links`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self._rank = hub, rank

    def exchange(self, text: bytes, idle: Callable[[], None], patience: float) -> list[bytes]:
        hub = self._hub
        with hub.changed:
            now = len(hub.rounds)
            hub.texts[self._rank] = text
            if len(hub.texts) == hub.size:
                hub.rounds.append([hub.texts[rank] for rank in range(hub.size)])
                hub.texts.clear()
                hub.changed.notify_all()
            while len(hub.rounds) == now:
                self._check()
                hub.changed.wait(0.005)
                idle()
            return hub.rounds[now]

    def send(self, tensor: Tensor) -> None:
        self._hub.queues[self._rank, 0].put(tensor.clone())

    def receive(self, tensor: Tensor, rank: int) -> None:
        tensor.copy_(self._get(rank, 0))

    def spread(self, tensor: Tensor) -> None:
        if self._rank == 0:
            for rank in range(1, self._hub.size):
                self._hub.queues[0, rank].put(tensor.clone())
        else:
            tensor.copy_(self._get(0, self._rank))

    def add(self, key: str, amount: int) -> int:
        with self._hub.changed:
            self._hub.numbers[key] += amount
            return self._hub.numbers[key]

    def close(self) -> None:
        pass

    def _get(self, source: int, destination: int) -> Tensor:
        while True:
            try:
                return self._hub.queues[source, destination].get(timeout=0.05)
            except Empty:
                self._check()

    def _check(self) -> None:
        if self._hub.lost:
            raise PeerLost("lost touch")


def run_world(size: int, work: Callable[[World], Result]) -> list[Result | BaseException]:
    """What ``work`` returns, or raises, in each process of a world of ``size``."""
    if size == 1:
        return [_outcome(work, ALONE)]
    hub = Hub(size)
    outcomes: list[Any] = [None] * size

    def process(rank: int) -> None:
        outcomes[rank] = _outcome(work, Team(MemoryLinks(hub, rank), rank, size, rank, size))
        if isinstance(outcomes[rank], BaseException):
            hub.lose()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), f"a process hangs; so far: {outcomes}"
    return outcomes


def _outcome(work: Callable[[World], Result], world: World) -> Result | BaseException:
    try:
        with world:
            return work(world)
    except BaseException as error:
        return error
