"""The rows of one process's share, step after step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain, tee
from types import TracebackType
from typing import TypeAlias

from streamgmm.io.intake import Chunk
from streamgmm.io.plan import Span, chunks_left, cut_spans, round_chunk_rows
from streamgmm.io.residency import Narrowing
from streamgmm.io.ring import Ring

Share: TypeAlias = tuple[Sequence[Span], Sequence[Span]]
"""The spans of a step, and those of them that one process owns."""


class Feed:
    """Chunks of this process's spans in every step: reading goes on into the next one while parameters are updated.

    Parameters
    ----------
    open_ring : callable
        Makes a ring for chunks of so many rows, which keeps this share of the device memory that it may keep rows in.
    chunk_rows : int
    granule : int
        What every chunk must be a whole number of.
    most : int
        How many spans that follow one another may share a chunk where they fit one.
    """

    def __init__(self, open_ring: Callable[[int, float], Ring], chunk_rows: int, granule: int, most: int = 1) -> None:
        self._open_ring, self._granule, self._most = open_ring, granule, most
        self.chunk_rows, self._kept = chunk_rows, 1.0
        self.ring = open_ring(chunk_rows, self._kept)
        self._stream: Generator[Chunk] | None = None
        self._chunks_left = 0
        self._narrowing: Narrowing | None = None
        self._as_stored = False

    def begin(self, left: Sequence[Span], steps: Iterable[Share], checked_rows: int) -> None:
        """Feed the rows of ``left`` and then those of every step after the first of ``steps``.

        ``left`` is what is left for this process of that first step, whatever it owned of it in the beginning. Where
        steps end, no step after has rows for this process. The first ``checked_rows`` rows come with checksums.
        """
        self._stop()
        self._steps = iter(steps)
        self._step, _ = next(self._steps, ((), ()))
        self._open(left, checked_rows)

    def keep_as(self, narrowing: Narrowing | None) -> None:
        """Before the first chunk of a step: the form in which rows may stay on the device, None where it is the stored.

        Once that is another one than before, or more is read again than it saves, rows stay as stored for good: a run
        that needed wider numbers will need them again.
        """
        before = self._narrowing
        self._as_stored |= narrowing is None or not self.ring.narrowing_pays
        self._as_stored |= before is not None and narrowing is not None and before.key != narrowing.key
        after = None if self._as_stored else narrowing
        if (before is None) == (after is None):
            return
        assert self._chunks_left == len(self.chunks(self._step, self._left)), "the step has begun"
        self._stop()
        self._narrowing = after
        self.ring.keep_as(after)
        self._open(self._left, self._checked_rows)

    def end(self) -> Ring:
        """The ring, for rows to be streamed otherwise, as they are stored: nothing is read ahead into its slots now."""
        self._stop()
        self._chunks_left = 0
        if self._narrowing is not None:
            self._narrowing = None
            self.ring.keep_as(None)
        return self.ring

    def __iter__(self) -> Iterator[Chunk]:
        """What is left of this step. Raises as `Ring.stream`."""
        while self._chunks_left and self._stream is not None:
            self._chunks_left -= 1
            yield next(self._stream)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left of this step."""
        return not self._chunks_left

    def next_step(self) -> None:
        """Go on with the step after this one, of which nothing is left."""
        self._step, self._left = next(self._steps, ((), ()))
        self._chunks_left = len(self.chunks(self._step, self._left))

    def shrink(self, segment: int) -> bool:
        """Begin ``segment`` of this step again with chunks of half the rows; False where they are as small as can be.

        Half as much stays on the device, too: it may be that which leaves too little for the rest. Every row comes with
        checksums again, as far ahead as they were asked for.
        """
        # Half of what was too much: a step may have far fewer rows than a chunk could.
        longest = max(chunk.rows for chunk in self.chunks(self._step, self._step))
        rows = round_chunk_rows(max(min(self.chunk_rows, longest) // 2, self._granule), self._granule)
        if rows >= self.chunk_rows:
            return False
        self._stop()
        self.ring.close()
        self.chunk_rows, self._kept, traffic = rows, self._kept / 2, self.ring.traffic
        del self.ring  # its memory is needed for the next one
        self.ring = self._open_ring(rows, self._kept)
        self.ring.traffic = traffic
        self.ring.keep_as(self._narrowing)
        again = [span for span in self._step if span.segment == segment]
        self._open([*again, *(span for span in self._left if span.segment > segment)], self._checked_rows)
        return True

    def _open(self, left: Sequence[Span], checked_rows: int) -> None:
        """A stream of ``left`` and of what comes after this step."""
        self._left, self._checked_rows = left, checked_rows
        chunks = self.chunks(self._step, left)
        self._chunks_left = len(chunks)
        self._steps, ahead = tee(self._steps)
        self._stream = self.ring.stream(
            chain(chunks, chain.from_iterable(self.chunks(*step) for step in ahead)), checked_rows
        )

    def chunks(self, step: Sequence[Span], own: Sequence[Span]) -> list[Span]:
        """Chunks of ``own`` rows of a step, in their order.

        A step is cut alike whatever is own: what stays in memory is found by its chunk in the next step, too.
        """
        return chunks_left(cut_spans(step, self.chunk_rows, self._most), own)

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
