"""What a table calls its rows: a column of integers, kept beside the rows from the first stage to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DataError


@dataclass(frozen=True)
class IdColumn:
    """A column of a Dask dataframe; called with a computed part, its values, (n,) int64.

    Raises
    ------
    DataError
        They are no integers that int64 holds, or some are missing.
    """

    name: str
    column: str

    def __call__(self, frame: Any) -> NDArray[np.int64]:
        values = frame[self.column]
        found = values.to_numpy()
        if values.isna().any() or getattr(found.dtype, "kind", "O") not in "iuO":
            raise self._refused("holds missing values, or no integers")
        try:
            ids = np.array([int(each) for each in found], np.int64) if found.dtype == object else found.astype(np.int64)
        except (ValueError, TypeError, OverflowError):
            raise self._refused("holds what is no integer of 64 bits") from None
        if (ids != found).any():
            raise self._refused("holds integers beyond int64")
        return ids

    def _refused(self, what: str) -> DataError:
        return DataError(
            f"{self.name}: id column {self.column!r} {what}; name another with --id-column, or use --ids, the numbers "
            "of the rows"
        )


@dataclass(frozen=True)
class Identifiers:
    """The kept values of such a column, in the order of the source.

    Attributes
    ----------
    paths : tuple of str
        ``.npy`` files, (n,) int64, one after the other.
    rows : tuple of int
        How many each has.
    """

    paths: tuple[str, ...]
    rows: tuple[int, ...]

    def of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The identifiers of rows by their ``numbers``, which ascend."""
        out, edges = np.empty(len(numbers), np.int64), [0, *accumulate(self.rows)]
        cuts = np.searchsorted(numbers, edges)
        for path, (low, high), first in zip(self.paths, pairwise(cuts), edges, strict=False):
            if low < high:
                out[low:high] = _opened(path)[numbers[low:high] - first]
        return out


@lru_cache(16)
def _opened(path: str) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.load(path, mmap_mode="r")
    return found


def ids_path(staged: Path) -> Path:
    """Beside the rows of a staged part."""
    return staged.with_suffix(".ids.npy")


def identifiers_of(staged: Sequence[Path], rows: Sequence[int]) -> Identifiers:
    """Those beside staged parts of so many rows."""
    return Identifiers(tuple(str(ids_path(path)) for path in staged), tuple(rows))
