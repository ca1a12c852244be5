"""Stored pieces that can only be decoded from their beginning: row groups of Parquet, batches of Arrow."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from threading import Lock

import numpy as np

from streamgmm.io.sources.base import Rows

WINDOW_BYTES = 64 << 20
"""Decoded rows kept of a granule, for calls that come a little out of order."""

_OPEN_BYTES = 2 * WINDOW_BYTES
_OPEN_GRANULES = 32


class _Open:
    """A granule being decoded: its decoder, the latest rows that it gave, and how many were handed out."""

    def __init__(self, first: int, pieces: Iterator[Rows]) -> None:
        self.lock = Lock()
        self.first, self.served = first, 0
        self.restart(pieces)

    def restart(self, pieces: Iterator[Rows]) -> None:
        self.pieces, self.next = pieces, self.first
        self.kept: deque[tuple[int, Rows]] = deque()
        self.kept_bytes = 0

    def advance(self) -> bool:
        """Decode the next piece; False at the end."""
        piece = next(self.pieces, None)
        if piece is None:
            return False
        self.kept.append((self.next, piece))
        self.kept_bytes += piece.nbytes
        self.next += len(piece)
        while len(self.kept) > 1 and self.kept_bytes > WINDOW_BYTES:
            self.kept_bytes -= self.kept.popleft()[1].nbytes
        return True

    def copy(self, start: int, stop: int, out: Rows) -> None:
        """Rows [start, stop), none before the window, into ``out``."""
        row = start
        while row < stop:
            for first, piece in self.kept:
                if first <= row < first + len(piece):
                    last = min(stop, first + len(piece))
                    np.copyto(out[row - start : last - start], piece[row - first : last - first], casting="unsafe")
                    row = last
            if row < stop and not self.advance():
                raise EOFError(f"it ends at row {self.next}")
        self.served += stop - start


class Granules:
    """Random access to rows that are decoded granule by granule, each a sequence of pieces.

    A scan decodes each granule once, whatever parts it is read in, and threads decode different granules at the same
    time. A granule whose rows were all handed out is forgotten, so memory holds those being read, and of each at most
    `WINDOW_BYTES` and a piece, however large it is. A call for rows that have left the window begins the granule again.

    Parameters
    ----------
    rows : sequence of int
        Rows of each granule.
    decode : callable
        Gives the pieces (n, D) of a granule in order, from its first row.
    """

    def __init__(self, rows: Sequence[int], decode: Callable[[int], Iterator[Rows]]) -> None:
        self.starts = [0, *accumulate(rows)]
        self._decode = decode
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = Lock()

    def of(self, row: int) -> int:
        """The granule that holds ``row``; bisection steps over empty ones."""
        return bisect_right(self.starts, row) - 1

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        """Fill ``out`` with rows [start, stop).

        Raises
        ------
        EOFError
            A granule holds fewer rows than it was said to.
        """
        row = start
        while row < stop:
            granule = self.of(row)
            last = min(stop, self.starts[granule + 1])
            self._read(granule, row, last, out[row - start : last - start])
            row = last

    def clear(self) -> None:
        """Forget what was decoded."""
        with self._lock:
            self._open.clear()

    def _read(self, granule: int, start: int, stop: int, out: Rows) -> None:
        state, done = self._state(granule), True
        try:
            with state.lock:
                if state.kept and state.kept[0][0] > start:
                    state.restart(self._decode(granule))
                state.copy(start, stop, out)
                done = state.served >= self.starts[granule + 1] - self.starts[granule]
        finally:
            # After an error too: what a decoder leaves behind is not to be read on.
            if done:
                with self._lock:
                    if self._open.get(granule) is state:
                        del self._open[granule]

    def _state(self, granule: int) -> _Open:
        with self._lock:
            state = self._open.pop(granule, None) or _Open(self.starts[granule], self._decode(granule))
            while self._open and (
                len(self._open) >= _OPEN_GRANULES or sum(x.kept_bytes for x in self._open.values()) >= _OPEN_BYTES
            ):
                self._open.popitem(last=False)
            self._open[granule] = state
            return state
