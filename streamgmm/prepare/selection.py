"""Which raw rows become which prepared rows, and what they look like then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources.base import Source
from streamgmm.prepare.steps import Drop
from streamgmm.transforms import RowMap, Transformation, granules, working
from streamgmm.weighting import Weighting

READ_BYTES = 4 << 20

TRAIN, HELD_OUT = 0, 1
"""The two outputs."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Granule:
    """A few consecutive raw rows, mapped.

    Attributes
    ----------
    first : int
        Number of the first among the raw rows.
    rows : (n, d) array
        All of them after the maps, also those that are left out.
    masks : two (n,) bool arrays
        Which of them belong to each output.
    """

    first: int
    rows: np.ndarray
    masks: tuple[Mask, Mask]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Maps and places where rows are dropped, in order, and who is held out."""

    items: tuple[RowMap | Drop, ...]
    granule: int
    holdout: float
    seed: int

    @property
    def selects(self) -> bool:
        """Whether a row's number among the prepared ones can differ from its own."""
        return self.holdout > 0 or self.drops

    @property
    def drops(self) -> bool:
        return any(isinstance(item, Drop) for item in self.items)

    def granules(self, source: Source, start: int, stop: int) -> Iterator[Granule]:
        """Rows [start, stop), mapped; ``start`` is a multiple of the granule, ``stop`` too or the end of the data."""
        row_bytes = source.shape[1] * source.dtype.itemsize
        at_once = max(1, READ_BYTES // (row_bytes * self.granule)) * self.granule
        for part in granules(stop - start, at_once):
            raw = values(source.read(start + part.start, start + part.stop))
            for inner in granules(len(raw), self.granule):
                yield self._granule(start + part.start + inner.start, raw[inner])

    def counts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows for each output, a granule at a time, where none is dropped: nothing is read for that."""
        for part in granules(stop - start, self.granule):
            held = int(self._held_out(start + part.start, start + part.stop).sum())
            yield part.stop - part.start - held, held

    def _granule(self, first: int, rows: np.ndarray) -> Granule:
        kept: Mask = np.ones(len(rows), dtype=bool)
        with np.errstate(all="ignore"):
            for item in self.items:
                if isinstance(item, Drop):
                    kept &= np.isfinite(rows).all(axis=1)
                else:
                    rows = item.apply(working(rows, item))
        held = self._held_out(first, first + len(rows))
        return Granule(first, rows, (kept & ~held, kept & held))

    def _held_out(self, start: int, stop: int) -> Mask:
        return Weighting(holdout=self.holdout, seed=self.seed).held_out(np.arange(start, stop))


@dataclass(frozen=True, eq=False)
class Ranks:
    """The number of each raw row among the rows of its output.

    Attributes
    ----------
    n_samples, granule : int
    firsts : tuple of (n_granules + 1,) int64 arrays, or None
        For each output, the number of the first of its rows in each granule; None where all rows go to the first.
    """

    n_samples: int
    granule: int
    firsts: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    @classmethod
    def counted(cls, n_samples: int, granule: int, counts: NDArray[np.int64]) -> Ranks:
        """From the rows of each granule for each output, (n_granules, 2)."""
        train, held = (np.concatenate([[0], np.cumsum(column, dtype=np.int64)]) for column in counts.T)
        return cls(n_samples, granule, (train, held))

    def total(self, output: int) -> int:
        """Rows of an output."""
        if self.firsts is None:
            return self.n_samples if output == TRAIN else 0
        return int(self.firsts[output][-1])

    def first(self, output: int, row: int) -> int:
        """Rows of an output before raw ``row``, the first of a granule."""
        if self.firsts is None:
            return row if output == TRAIN else 0
        return int(self.firsts[output][row // self.granule])

    def holding(self, output: int, start: int, stop: int) -> tuple[int, int]:
        """The raw rows, by whole granules, that hold rows [start, stop) of an output."""
        if self.firsts is None:
            low, high = start // self.granule, -(-stop // self.granule)
        else:
            low = int(np.searchsorted(self.firsts[output], start, side="right")) - 1
            high = int(np.searchsorted(self.firsts[output], stop, side="left"))
        return low * self.granule, min(high * self.granule, self.n_samples)


def stored(source: Source, granule: Granule, wanted: Mask | slice, transformation: Transformation) -> np.ndarray:
    """The ``wanted`` rows of a granule as they are stored.

    Raises
    ------
    DataError
        One of them is not finite, or too large for the type; file and row are named.
    """
    rows = granule.rows[wanted]
    _check(source, granule, wanted, rows, "holds NaN or infinity; add the step drop or impute")
    result = transformation.store(rows)
    if result is not rows:
        beyond = f"holds a value that {result.dtype.name} cannot; give a wider --dtype, or standardise first"
        _check(source, granule, wanted, result, beyond)
    return result


def check_finite(source: Source, granule: Granule, wanted: Mask) -> None:
    """Raise as `stored`, where the wanted rows are about to be summed."""
    _check(source, granule, wanted, granule.rows[wanted], "holds NaN or infinity; add the step drop or impute")


def _check(source: Source, granule: Granule, wanted: Mask | slice, rows: np.ndarray, what: str) -> None:
    if rows.dtype.kind != "f":
        return
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        numbers = np.arange(granule.first, granule.first + len(granule.rows))[wanted]
        raise DataError(f"{source.locate(int(numbers[np.argmin(finite)]))}: {what}")
