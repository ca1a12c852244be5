"""What a Dask worker does as one process of a fit."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from streamgmm.cluster.members import Place
from streamgmm.distributed import ALONE, Team, World, told
from streamgmm.errors import DataError, PeerLost, StreamGMMError
from streamgmm.fitting import assist, fit
from streamgmm.io.sources.base import Recipe
from streamgmm.processes import TorchLinks
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult

JOIN_SECONDS = 60.0
"""How long a rank waits for the others to begin: their workers may be busy with other tasks."""


@dataclass(frozen=True, eq=False)
class Task:
    """What every rank of a fit is sent. Data is opened there, where errors can be told; ``request`` has no weights."""

    source: Recipe
    weights: Recipe | None
    request: FitRequest
    output: Path | None
    fresh: bool


@dataclass(frozen=True, eq=False)
class Ended:
    """How a rank ended: the leader with a result, any with an error as `distributed.told` writes it, or neither."""

    result: FitResult | None = None
    failure: dict[str, Any] | None = None

    @property
    def well(self) -> bool:
        return self.failure is None


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one fit find each other: the leader's store. ``token`` tells one attempt from another."""

    token: str
    host: str
    port: int


_stores: dict[str, TCPStore] = {}
"""Of the fits that this worker leads, by their token."""

_stops: dict[str, int] = {}
"""The signal that asked each of them to stop."""


def open_store(token: str, host: str) -> int:
    """Open the store in which the ranks of a fit find each other, on a free port of this worker; gives the port."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_SECONDS))
    _stores[token] = store
    return int(store.port)


def ask_to_stop(token: str, number: int) -> None:
    """Have the fit that this worker leads save what it has, and end as on signal ``number``."""
    _stops[token] = number


def run_rank(place: Place, meeting: Meeting, task: Task) -> Ended:
    """Be one process of a fit, from joining the others to the end; errors are given, not raised."""
    try:
        client = _Client(meeting.token)
        with _world(place, meeting, client.check) as world:
            try:
                source = task.source.open()
                request = replace(task.request, weights=None if task.weights is None else task.weights.open())
            except DataError as error:
                raise DataError(
                    f"worker {place.member.address}: {error}; every worker must see the data under the same path"
                ) from None
            if not world.leads:
                assist(source, request, Quiet(client), world=world)
                return Ended()
            return Ended(fit(source, request, task.output, Telling(client), fresh=task.fresh, world=world))
    # The other end decides what becomes of it.
    except Exception as error:
        return Ended(failure=told(error))
    finally:
        _stores.pop(meeting.token, None)
        _stops.pop(meeting.token, None)


class _Client:
    """Who asked for the fit, as a worker's task sees it."""

    def __init__(self, token: str) -> None:
        from distributed import get_worker
        from distributed.worker import thread_state

        self.token = token
        self._worker = get_worker()
        self._key = thread_state.key

    def tell(self, kind: str, what: object) -> None:
        """Have `fit_on` hear of something; what is told of one fit arrives in order."""
        self._worker.log_event(self.token, (kind, what))

    @property
    def gone(self) -> bool:
        """Whether nobody waits for this task any more."""
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state == "cancelled"

    def check(self) -> None:
        if self.gone:
            raise PeerLost("the client of this fit is gone; what was saved is intact")


class Quiet(Progress):
    """Tells nothing, and stops when nobody wants the result."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    def stop_requested(self) -> int | None:
        return _stops.get(self._client.token) or (signal.SIGHUP if self._client.gone else None)


class Telling(Quiet):
    """What the leader's fit tells, for the client."""

    def stage(self, text: str) -> None:
        self._client.tell("stage", text)

    def iteration(self, record: dict[str, object]) -> None:
        self._client.tell("iteration", record)

    def note(self, text: str) -> None:
        self._client.tell("note", text)

    def warn(self, text: str) -> None:
        self._client.tell("warn", text)


@contextmanager
def _world(place: Place, meeting: Meeting, check: Callable[[], None]) -> Iterator[World]:
    if place.size == 1:
        yield ALONE
        return
    store = _joined(place, meeting)
    try:
        with _reachable_at(place.member.host):
            links = TorchLinks(store, place.rank, place.size, check)
    except (RuntimeError, ValueError) as error:
        raise PeerLost(f"the workers did not find each other ({str(error).splitlines()[0]})") from None
    try:
        with Team(links, place.rank, place.size, place.local_rank, place.local_size) as world:
            yield world
    finally:
        # Whatever happened: this process lives on, and joins the next attempt.
        if torch.distributed.is_initialized():
            links.close()


def _joined(place: Place, meeting: Meeting) -> TCPStore:
    """The store, once all ranks have reached it.

    Raises
    ------
    PeerLost
        They have not, in time; or this worker was started anew since the fit began.
    """
    patience = timedelta(seconds=JOIN_SECONDS)
    try:
        if place.rank == 0:
            store = _stores[meeting.token]
        else:
            store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=patience)
        if store.add(f"begun/{place.rank}", 1) > 1:
            raise PeerLost(f"worker {place.member.address} began twice")
        store.set(f"here/{place.rank}", "")
        store.wait([f"here/{rank}" for rank in range(place.size)], patience)
    except KeyError:
        raise PeerLost(f"worker {place.member.address} was started anew") from None
    except RuntimeError as error:
        raise StreamGMMError(
            f"worker {place.member.address}: the others did not come within {JOIN_SECONDS:.0f} s "
            f"({str(error).splitlines()[0]}); see that no worker is busy with other tasks, and that they reach each "
            "other"
        ) from None
    return store


@contextmanager
def _reachable_at(host: str) -> Iterator[None]:
    """Have gloo and NCCL use the network that the other workers reach this one by, unless the user chose another.

    Left alone, gloo takes whatever this machine's own name stands for, which is often 127.0.0.1.
    """
    import psutil  # which distributed brings

    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = host
    found = [name for name, entries in psutil.net_if_addrs().items() if address in {each.address for each in entries}]
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if found and name not in os.environ]
    os.environ.update(dict.fromkeys(names, found[0] if found else ""))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
