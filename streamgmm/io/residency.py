"""Which chunks stay where they were read to, so that later passes need not read or copy them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from torch import Tensor

from streamgmm.io.plan import Span
from streamgmm.io.sources.base import Source

BLOCK_BYTES = 1 << 30
"""Memory of a tier is taken in blocks of at most this: a power of two, as the allocator of pinned memory wants it."""

_EXACT_BLOCK_BYTES = 1 << 28
"""Where memory comes in any size: blocks of about this, of as many chunks as fit."""

_ALIGNMENT = 4096


class Narrowing(Protocol):
    """A narrower form than the stored one in which rows may stay on a device."""

    @property
    def key(self) -> Hashable:
        """Equal where rows are left with the same bits."""
        ...

    def size(self, rows: int) -> int:
        """Bytes that so many rows take."""
        ...

    def narrow(self, rows: Tensor, place: Tensor) -> None:
        """Fill ``place``, ``size(n)`` bytes, from stored ``rows`` (n, D), both on the device, in the stream's order."""
        ...


class Tier:
    """Room for the first chunks that come, up to a budget; they keep their place for good.

    A chunk read or copied into its place is *held* from then on, and served from there.

    Parameters
    ----------
    budget : int
        Bytes.
    allocate : callable
        Gives so many bytes of memory, uint8, page-aligned.
    exact : bool
        Whether it takes no more for a size that is no power of two.
    """

    def __init__(self, budget: int, allocate: Callable[[int], Tensor], *, exact: bool = False) -> None:
        self._budget = self._left = budget
        self._allocate, self._exact = allocate, exact
        self._unused = list[Tensor]()
        self._places: dict[tuple[int, int], Tensor] = {}
        self._held: set[tuple[int, int]] = set()

    def place(self, span: Span, size: int) -> Tensor | None:
        """``size`` bytes for a span, the same at every call; None where the budget is spent."""
        key = (span.start, span.stop)
        if key not in self._places:
            room = -(-size // _ALIGNMENT) * _ALIGNMENT
            if all(room > len(part) for part in self._unused) and not self._grow(room):
                self._left = 0
                return None
            part = next(part for part in self._unused if room <= len(part))
            self._unused = [other for other in self._unused if other is not part]
            self._places[key] = part[:size]
            if len(part) > room:
                self._unused.append(part[room:])
        return self._places[key]

    def holds(self, span: Span) -> bool:
        """Whether the span's rows lie in its place."""
        return (span.start, span.stop) in self._held

    def hold(self, span: Span) -> None:
        """Its rows lie in its place now, if it has one."""
        if (span.start, span.stop) in self._places:
            self._held.add((span.start, span.stop))

    def emptied(self) -> Tier:
        """One with as much room that holds nothing."""
        return Tier(self._budget, self._allocate, exact=self._exact)

    def _grow(self, room: int) -> bool:
        if self._exact:
            block = room * max(1, min(_EXACT_BLOCK_BYTES, self._left) // room)
        else:
            block = min(BLOCK_BYTES, 1 << max(0, self._left.bit_length() - 1))
            block = max(block, 1 << (room - 1).bit_length())
        if block > self._left:
            return False
        try:
            self._unused.append(self._allocate(block))
        except (MemoryError, RuntimeError):  # torch.OutOfMemoryError and what pinning raises are RuntimeErrors
            return False
        self._left -= block
        return True


def cached_rows(source: Source, host_memory: int | None, *, resident: bool) -> int:
    """How many of the first rows are read through the page cache; the others are read past it.

    A scan of data larger than memory finds nothing in a cache that keeps what was used last; one that keeps the first
    part finds that, pass after pass. With rows ``resident`` in memory the cache would hold them twice.
    """
    stored = 0 if host_memory is None else source.stored_bytes
    if host_memory is None or stored <= host_memory:
        return source.shape[0]
    return 0 if resident else source.shape[0] * host_memory // stored
