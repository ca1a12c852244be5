"""One number a row, as a source of a single feature."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Recipe, Source
from streamgmm.io.sources.npy import NpySource


class NpyVector(NpySource):
    """An ``.npy`` file of shape (N,) or (N, 1). Raises as `NpySource`."""

    def _read_header(self) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
        shape, fortran_order, dtype, offset = super()._read_header()
        return (shape[0], 1) if len(shape) == 1 else shape, fortran_order and len(shape) != 1, dtype, offset


def open_vector(data: Any) -> Source:
    """``data`` (N,) or (N, 1), an array or whatever `open_source` opens. Raises as `open_source`."""
    if isinstance(data, (str, os.PathLike)):
        if not os.fspath(data).endswith(".npy"):
            return open_source(data)
        vector = NpyVector(data)
        vector.opened_by = Recipe(open_vector, (str(Path(data).absolute()),))
        return vector
    if isinstance(data, Source):
        return data
    if len(getattr(data, "shape", (0, 0))) == 2:
        return open_source(data)
    return open_source(np.asarray(data).reshape(-1, 1))
