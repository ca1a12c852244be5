"""Rows that are in memory already: NumPy arrays, memory maps, torch tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import as_rows, opaque
from streamgmm.io.sources.base import STORED_DTYPES, Recipe, Rows, Source, check_shape

TRAVELLING_BYTES = 64 << 20
"""Arrays of at most this are sent to other processes; larger ones are theirs to read."""


class ArraySource(Source):
    """A two-dimensional array. Types that no kernel reads are converted while they are copied, not before."""

    def __init__(self, array: np.ndarray | torch.Tensor, name: str = "array") -> None:
        self.name = name
        self.shape = check_shape(name, array.shape)
        self._array: np.ndarray = _as_numpy(array)
        self.dtype = stored_dtype(name, self._array.dtype)

    def recipe(self) -> Recipe:
        small = self._array.nbytes <= TRAVELLING_BYTES
        return Recipe(ArraySource, (np.asarray(self._array), self.name)) if small else super().recipe()

    def view(self, start: int, stop: int) -> Rows | None:
        rows = self._array[start:stop]
        usable = rows.dtype == self.dtype and rows.flags.c_contiguous and rows.flags.writeable
        # A memory map's pages would count as this process's memory.
        return rows if usable and not isinstance(self._array, np.memmap) else None

    def gather(self, indices: NDArray[np.int64]) -> tuple[Rows, int]:
        return np.asarray(self._array[indices], dtype=self.dtype), len(indices)

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        np.copyto(out, self._array[start:stop], casting="unsafe")


def stored_dtype(name: str, dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The streamed type for an array of ``dtype``: itself where a kernel reads it, else one that holds its values.

    Raises
    ------
    DataError
        The values are not real numbers.
    """
    native = dtype.newbyteorder("=")
    if native in STORED_DTYPES:
        return native
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind in "iu":
        return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)
    if dtype.kind == "f":
        return np.dtype(np.float64)
    raise DataError(f"{name}: holds {dtype}; give real numbers (float64, float32, float16, bfloat16, int8 or uint8)")


def _as_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        return as_rows(array.detach().cpu())
    return opaque(array)
