"""Several processes that fit one model: who owns which segments, and how they exchange what they know.

Each process owns a contiguous share of the segments and reads only those. The processes meet when every share is
summed, or earlier when one of them calls: their sums then go to the leader, rank 0, which decides what follows and
tells the others. Nothing else is exchanged, so a pass costs one reduction however long it is.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from streamgmm import errors
from streamgmm.errors import Interrupted, PeerLost, Reported, StreamGMMError
from streamgmm.io.plan import Span
from streamgmm.storage import parse_json

PATIENCE_SECONDS = 7200.0
"""How long a process waits for the others: for one with slower storage, or for the leader's seeding."""

LAST_SECONDS = 60.0
"""How long a process that failed waits for the others to come and hear why."""

_SECONDS_BETWEEN_LOOKS = 0.1


def share_of(spans: Sequence[Span], rank: int, size: int) -> list[Span]:
    """The contiguous run of ``spans`` that ``rank`` of ``size`` owns; all own about as many rows.

    A span belongs to the rank in whose part of all rows its middle lies.
    """
    ends = list(accumulate(span.rows for span in spans))
    borders = [ends[-1] * r / size for r in range(1, size)] if ends else []
    return [span for span, end in zip(spans, ends, strict=True) if bisect_right(borders, end - span.rows / 2) == rank]


@dataclass(frozen=True)
class Message:
    """JSON values and named tensors."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class World:
    """The processes that fit together; this one fits alone.

    Every method with ``all`` in its first line is called by all of them, in the same order. An exception in one of them
    ends all, and is told by the leader; see `Team`.

    Attributes
    ----------
    rank, size : int
        This process among all.
    local_rank : int or None
        Among those of its machine; None when alone.
    local_size : int
        Processes on this machine.
    """

    rank, size = 0, 1
    local_rank: int | None = None
    local_size = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, message: Message, idle: Callable[[], None] = lambda: None) -> list[Message]:
        """All send ``message`` to the leader, which gets them in the order of ranks; the others get nothing.

        ``idle`` is called now and then while others have not come yet.
        """
        return [message]

    def broadcast(self, message: Message | None) -> Message:
        """All get the ``message`` of the leader."""
        assert message is not None
        return message

    def call(self) -> None:
        """Ask all processes to come to the next `gather` soon."""

    def called(self) -> bool:
        """Whether somebody called."""
        return False

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to leave."""


ALONE = World()


class Links(Protocol):
    """How bytes and tensors move between processes. Everything may raise `PeerLost`."""

    def exchange(self, text: bytes, idle: Callable[[], None], patience: float) -> list[bytes]:
        """The texts of all ranks, which all call it. Raises PeerLost when they have not after ``patience`` seconds."""
        ...

    def send(self, tensor: Tensor) -> None:
        """Send to the leader."""
        ...

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill ``tensor`` with what ``rank`` sends."""
        ...

    def spread(self, tensor: Tensor) -> None:
        """Fill ``tensor`` on all ranks with the leader's."""
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to a number that all see, 0 at first, and return it; waits for nobody."""
        ...

    def close(self) -> None:
        """Leave in order: all have left, or will."""
        ...


class Team(World):
    """Several processes.

    As a context it makes an exception in one of them end them all: its one line is told by the leader, and the others
    raise `Reported`, which nobody need print, with the same exit status. A process that is killed cannot tell; one of
    the others then raises `PeerLost`, and the rest `Reported`.
    """

    def __init__(self, links: Links, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._links = links
        self._meeting = 0
        self._looked = 0.0
        self._exchanging = False
        self._agreed = False

    def gather(self, message: Message, idle: Callable[[], None] = lambda: None) -> list[Message]:
        headers = self._exchange(_header(message), idle)
        self._meeting += 1
        if not self.leads:
            for tensor in message.tensors.values():
                self._links.send(tensor.contiguous())
            return []
        others = [self._receive(header, rank) for rank, header in enumerate(headers) if rank > 0]
        return [message, *others]

    def broadcast(self, message: Message | None) -> Message:
        headers = self._exchange({} if message is None else _header(message))
        message = message or _room_for(headers[0])
        for tensor in message.tensors.values():
            self._links.spread(tensor)
        return message

    def call(self) -> None:
        with suppress(PeerLost):  # which the meeting will find out
            self._links.add(f"call/{self._meeting}", 1)

    def called(self) -> bool:
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return False
        self._looked = now
        try:
            return self._links.add(f"call/{self._meeting}", 0) > 0
        except PeerLost:
            return True

    def _receive(self, header: Mapping[str, Any], rank: int) -> Message:
        message = _room_for(header)
        for tensor in message.tensors.values():
            self._links.receive(tensor, rank)
        return message

    def _exchange(
        self, header: Mapping[str, Any], idle: Callable[[], None] = lambda: None, patience: float = PATIENCE_SECONDS
    ) -> list[dict[str, Any]]:
        """What all ranks have to say, or the first failure among it, raised."""
        self._exchanging = True
        texts = self._links.exchange(json.dumps(header).encode(), idle, patience)
        self._exchanging = False
        headers: list[Any] = [parse_json(text) for text in texts]
        failures = [(rank, heard["error"]) for rank, heard in enumerate(headers) if "error" in heard]
        if failures:
            self._agreed = True
            rank, failure = failures[0]
            raise raised(failure, f"process {rank}") if self.leads else Reported(failure["status"])
        return headers

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._agreed:
            self._links.close()
        elif isinstance(error, Exception) and self._may_tell(error):
            self._tell(error)
        elif isinstance(error, StreamGMMError) and not self._first():
            raise Reported(error.exit_status) from None

    def _may_tell(self, error: Exception) -> bool:
        """Whether the others will listen before long: not when they are gone, nor when this one is wanted elsewhere."""
        return not (self._exchanging or isinstance(error, PeerLost) or (isinstance(error, Interrupted) and self.rank))

    def _tell(self, error: Exception) -> None:
        """Bring ``error`` to the others' next meeting."""
        try:
            self.call()
            self._exchange({"error": told(error)}, patience=LAST_SECONDS)
        except PeerLost:
            if not self._first():
                raise Reported(told(error)["status"]) from error
        except Reported:
            self._links.close()
            raise
        except StreamGMMError:  # the leader's own, which is on its way already
            self._links.close()

    def _first(self) -> bool:
        """Whether nobody has told the user yet why the run ends."""
        try:
            return self._links.add("told", 1) == 1
        except PeerLost:
            return True


def _header(message: Message) -> dict[str, Any]:
    tensors = [
        [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.device.type]
        for name, tensor in message.tensors.items()
    ]
    return {"facts": dict(message.facts), "tensors": tensors}


def _room_for(header: Mapping[str, Any]) -> Message:
    """The announced message with memory for its tensors, which are still to come."""
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, dtype, shape, device in header["tensors"]
    }
    return Message(header["facts"], tensors)


def told(error: Exception) -> dict[str, Any]:
    """An error as JSON values, for another process: `raised` makes an error of them again."""
    known = isinstance(error, StreamGMMError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    status = error.exit_status if isinstance(error, StreamGMMError) else 1
    return {"kind": type(error).__name__, "text": text, "status": status}


def raised(failure: Mapping[str, Any], where: str) -> StreamGMMError:
    """The error of another process as this one raises it; one that nobody foresaw names ``where`` it happened."""
    if failure["kind"] == Reported.__name__:
        return Reported(failure["status"])
    if failure["kind"] == Interrupted.__name__:
        return Interrupted(failure["status"] - 128, failure["text"])
    kind = getattr(errors, failure["kind"], None)
    if isinstance(kind, type) and issubclass(kind, StreamGMMError):
        return kind(failure["text"])
    return StreamGMMError(f"{where}: {failure['text']}")
