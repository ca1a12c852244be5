"""The rows of one process's share, pass after pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, cycle
from types import TracebackType

from streamgmm.io.plan import Span, cut_spans, round_chunk_rows
from streamgmm.io.ring import Chunk, Ring


class Feed:
    """Chunks of some segments in every pass: reading goes on from one pass to the next while parameters are updated.

    Parameters
    ----------
    open_ring : callable
        Makes a ring for chunks of so many rows.
    chunk_rows : int
    granule : int
        What every chunk must be a whole number of.
    """

    def __init__(self, open_ring: Callable[[int], Ring], chunk_rows: int, granule: int) -> None:
        self._open_ring, self._granule = open_ring, granule
        self.chunk_rows = chunk_rows
        self.ring = open_ring(chunk_rows)
        self._stream: Generator[Chunk] | None = None
        self._chunks_left = 0

    def begin(self, this_pass: Sequence[Span], passes: Sequence[Span]) -> None:
        """Feed the rows of ``this_pass`` and then, again and again, those of ``passes``: spans of one segment each.

        Every row comes with checksums once, so that a run never goes on with data that changed while it was stopped.
        """
        self._stop()
        self._this_pass, self._passes = list(this_pass), list(passes)
        first, later = (cut_spans(spans, self.chunk_rows) for spans in (this_pass, passes))
        checked = first if this_pass == passes else [*first, *later]
        self._chunks_left, self._chunks_a_pass = len(first), len(later)
        self._stream = self.ring.stream(chain(first, cycle(later)), sum(span.rows for span in checked))

    def __iter__(self) -> Iterator[Chunk]:
        """What is left of this pass. Raises as `Ring.stream`."""
        while self._chunks_left and self._stream is not None:
            self._chunks_left -= 1
            yield next(self._stream)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left of this pass."""
        return not self._chunks_left

    def next_pass(self) -> None:
        """Go on with the pass after this one, of which nothing is left; or begin again, where something is."""
        if self._chunks_left:
            self.begin(self._passes, self._passes)
        else:
            self._this_pass, self._chunks_left = self._passes, self._chunks_a_pass

    def shrink(self, segment: int) -> bool:
        """Begin ``segment`` again with chunks of half the rows; False where they are as small as can be."""
        rows = round_chunk_rows(max(self.chunk_rows // 2, self._granule), self._granule)
        if rows >= self.chunk_rows:
            return False
        self._stop()
        self.ring.close()
        self.chunk_rows, traffic = rows, self.ring.traffic
        del self.ring  # its memory is needed for the next one
        self.ring = self._open_ring(rows)
        self.ring.traffic = traffic
        again = [span for span in self._passes if span.segment == segment]
        self.begin([*again, *(span for span in self._this_pass if span.segment > segment)], self._passes)
        return True

    def _stop(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self.ring.close()
