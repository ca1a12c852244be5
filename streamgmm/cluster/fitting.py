"""A fit whose processes are the workers of a Dask cluster: attempts, until one comes to its end."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from streamgmm.cluster.connecting import NoWorkersError, address_of, connected
from streamgmm.cluster.members import Member, device_for, members_of, places_of
from streamgmm.cluster.rank import Ended, Meeting, Task, ask_to_stop, open_store, run_rank
from streamgmm.distributed import LAST_SECONDS, raised, told
from streamgmm.errors import PeerLost, Reported, RequestError, StreamGMMError
from streamgmm.io.sources.base import Source
from streamgmm.io.wording import reason_of
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult

RESTARTS = 3
"""How often a fit goes on without workers that it lost."""

RETURN_SECONDS = 60.0
"""How long to wait for the first worker to come back, where none is left."""

_SECONDS_BETWEEN_LOOKS = 0.2

_ENDED = "ended"
"""Among what the leader tells: that a rank's task is no longer running."""


def fit_on(
    scheduler: Any,
    source: Source,
    request: FitRequest,
    output: Path | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> FitResult:
    """Fit on the workers of a Dask cluster, one process each, to the bits of `streamgmm.fitting.fit`.

    When a worker is lost, those that are left go on from the last checkpoint, at most `RESTARTS` times; without
    ``output`` they begin again.

    Parameters
    ----------
    scheduler : address or `distributed.Client`
    source : Source
        Whose files every worker sees under the same names; of an array in memory, at most 64 MiB.
    output : Path, optional
        A RUN folder that every worker sees.

    Raises
    ------
    RequestError
        No scheduler answers, it has no workers, they lack this package or have another version of it, or they cannot
        read ``source``.
    Interrupted
        ``progress.stop_requested`` named a signal; a checkpoint was written first.
    PeerLost
        The scheduler or too many workers were lost.
    StreamGMMError
        As `streamgmm.fitting.fit`.
    """
    progress = progress or Progress()
    with connected(scheduler) as client:
        members = members_of(client)
        request = replace(request, device=device_for(members, request.device))
        task = _task(source, request, output, fresh=fresh)
        for lives in reversed(range(RESTARTS + 1)):
            with _Attempt(client, members, progress) as attempt:
                try:
                    return attempt.run(task)
                except PeerLost as error:
                    if not lives:
                        raise PeerLost(f"{error}; gave up after {RESTARTS} restarts") from None
                    lost = str(error)
            # What is there now is this fit's own.
            task, members = replace(task, fresh=False), _members_left(client)
            how = "going on from the last checkpoint" if output else "beginning again, for there is no RUN folder"
            progress.warn(f"{lost}; {how}, on {len(members)} worker{'s' * (len(members) > 1)}")
    raise AssertionError("unreachable")


def device_on(scheduler: Any, wanted: str) -> str:
    """The kind of device that ``wanted`` means on the workers: ``cpu``, or ``cuda`` and whatever follows it.

    Raises RequestError as `fit_on`.
    """
    with connected(scheduler) as client:
        return device_for(members_of(client), wanted)


def _task(source: Source, request: FitRequest, output: Path | None, *, fresh: bool) -> Task:
    try:
        weights = None if request.weights is None else request.weights.recipe()
        recipe = source.recipe()
    except RequestError as error:
        raise RequestError(f"{error}; every worker must see it under the same path") from None
    return Task(recipe, weights, replace(request, weights=None), output and output.absolute(), fresh)


def _members_left(client: Any) -> list[Member]:
    """The workers that can go on, once there is one: a nanny starts what died again, which takes seconds."""
    last = time.monotonic() + RETURN_SECONDS
    while True:
        _check_open(client)
        try:
            return members_of(client)
        except NoWorkersError as error:
            if time.monotonic() > last:
                raise PeerLost(f"no workers are left to go on with ({error}); what was saved is intact") from None
        except OSError as error:
            raise PeerLost(f"lost touch with the scheduler {address_of(client)} ({reason_of(error)})") from None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _check_open(client: Any) -> None:
    """Raise PeerLost where the scheduler has been gone for so long that the client has given it up."""
    if client.status in ("closing", "closed"):
        raise PeerLost("the scheduler is gone; what was saved is intact: start one, and run the same command again")


class _Attempt:
    """One rank on each of some workers, watched until all have ended, or one is lost."""

    def __init__(self, client: Any, members: Sequence[Member], progress: Progress) -> None:
        self._client, self._members, self._progress = client, members, progress
        self._token = f"streamgmm-fit-{uuid4().hex}"
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._futures: list[Any] = []
        self._lost: set[str] = set()
        self._stopping = self._watched_to_the_end = False

    def __enter__(self) -> _Attempt:
        self._client.subscribe_topic(self._token, lambda event: self._events.put(event[1]))
        return self

    def __exit__(self, *_: object) -> None:
        """No rank is left behind, whatever happened."""
        with suppress(Exception):
            self._client.unsubscribe_topic(self._token)
        if not (self._stopping or self._watched_to_the_end or self._client.status == "closed"):
            # An exception of this process's own, such as a second SIGINT.
            self._stop(signal.SIGTERM)
            last = time.monotonic() + LAST_SECONDS
            while self._running() and time.monotonic() < last:
                self._listen(_SECONDS_BETWEEN_LOOKS)
        self._remove()

    def run(self, task: Task) -> FitResult:
        """The result.

        Raises
        ------
        PeerLost
            A worker is gone, or the scheduler; another attempt may succeed.
        StreamGMMError
            What a rank raised.
        """
        try:
            leader, places = self._members[0], places_of(self._members)
            port = 0
            if len(places) > 1:
                port = self._client.run(open_store, self._token, leader.host, workers=[leader.address])[leader.address]
            meeting = Meeting(self._token, leader.host, port)
            self._futures = [
                self._client.submit(
                    run_rank,
                    place,
                    meeting,
                    task,
                    key=f"{self._token}-{place.rank}",
                    workers=[place.member.address],
                    allow_other_workers=False,
                    pure=False,
                    retries=0,
                )
                for place in places
            ]
            for future in self._futures:
                future.add_done_callback(lambda future: self._events.put((_ENDED, future.key)))
            return self._watched()
        except OSError as error:
            raise PeerLost(f"lost touch with the cluster ({reason_of(error)})") from None

    def _watched(self) -> FitResult:
        last: float | None = None
        while self._running() and (last is None or time.monotonic() < last):
            _check_open(self._client)
            self._lost |= {member.address for member in self._members} - set(self._client.nthreads())
            number = self._progress.stop_requested()
            if number is not None and not self._stopping:
                self._stop(number)
            # A rank that ended well leaves the leader to save the model, which takes as long as it takes.
            failed = any(future.done() and not self._ended(future).well for future in self._futures)
            if last is None and (self._lost or self._stopping or failed):
                last = time.monotonic() + LAST_SECONDS
            self._listen(_SECONDS_BETWEEN_LOOKS)
        self._listen(0)
        self._watched_to_the_end = True
        return self._judged()

    def _judged(self) -> FitResult:
        ended = [self._ended(future) for future in self._futures]
        if ended[0].result is not None:
            return ended[0].result
        failures = [(rank, each.failure) for rank, each in enumerate(ended) if each.failure is not None]
        errors = [raised(failure, f"worker {self._members[rank].address}") for rank, failure in failures]
        known = [error for error in errors if not isinstance(error, (Reported, PeerLost))]
        if self._lost:
            raise PeerLost(f"lost worker {', '.join(sorted(self._lost))}")
        if known:
            raise known[0]
        slow = ", ".join(self._members[rank].address for rank in self._running())
        raise next((each for each in errors if isinstance(each, PeerLost)), PeerLost(f"worker {slow} does not end"))

    def _ended(self, future: Any) -> Ended:
        """How a rank ended; one that has not, or whose worker died, says nothing."""
        if future.status == "finished":
            found = future.result()
            assert isinstance(found, Ended)
            return found
        if future.status == "error":
            error = future.exception()
            gone = type(error).__name__ in ("KilledWorker", "CancelledError", "FutureCancelledError")
            return Ended(failure=told(PeerLost(reason_of(error)) if gone else StreamGMMError(reason_of(error))))
        return Ended() if future.status == "pending" else Ended(failure=told(PeerLost("its task was cancelled")))

    def _running(self) -> list[int]:
        """Ranks that have not ended; one whose worker is gone never would."""
        return [
            rank
            for rank, (future, member) in enumerate(zip(self._futures, self._members, strict=False))
            if future.status == "pending" and member.address not in self._lost
        ]

    def _stop(self, number: int) -> None:
        self._stopping = True
        with suppress(Exception):  # the leader's worker may be gone
            self._client.run(ask_to_stop, self._token, number, workers=[self._members[0].address])

    def _remove(self) -> None:
        """Forget all ranks; what waits for others sees that nobody wants it any more, and what hangs is ended with its
        process, where a nanny starts that again."""
        hung = [self._members[rank].address for rank in self._running()]
        with suppress(Exception):
            self._client.cancel(self._futures, force=True)
            if hung:
                self._client.restart_workers(hung, timeout=RETURN_SECONDS, raise_for_error=False)

    def _listen(self, seconds: float) -> None:
        """Pass on what the leader tells, waiting for that, or for a rank to end, at most so long."""
        with suppress(Empty):
            kind, what = self._events.get(timeout=max(0.0, seconds))
            while True:
                if kind != _ENDED:
                    getattr(self._progress, kind)(what)
                kind, what = self._events.get_nowait()
