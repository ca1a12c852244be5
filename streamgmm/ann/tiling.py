"""How many rows meet the centroids at once, and what memory that takes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.intake import DEVICE_BUFFERS, SLOTS
from streamgmm.io.plan import round_chunk_rows
from streamgmm.io.sources.base import Source
from streamgmm.kernels.fused.configs import architecture_of
from streamgmm.units import format_bytes

_TILE_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores, or residuals, of one tile."""

_TILE_ROWS = {"cpu": (64, 4096), "cuda": (1024, 65_536)}

SEARCH_VERSION = 2
"""Of `kernels.neighbours`: another one may give a row other lists, so that half of a run cannot be finished with it."""

_FUSED_BYTES = 384 << 20
_FUSED_ROWS = (1024, 1 << 18)

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_RUNTIME_BYTES = 24 << 20


def fused(dtype: np.dtype[np.generic], device: torch.device) -> bool:
    """Whether rows of ``dtype`` meet the centroids in `kernels.neighbours`."""
    return device.type == "cuda" and dtype != np.float64 and find_spec("triton") is not None


@dataclass(frozen=True)
class Tiling:
    """Attributes
    ----------
    n_lists : int
        Centroids.
    granule : int
        A chunk is a multiple of so many rows, or less than one.
    most_rows : int
        Rows of one product at most, a multiple of the granule.
    row_bytes : int
        What each of them takes, results not counted.
    fixed_bytes : int
        What the centroids take.
    """

    n_lists: int
    granule: int
    most_rows: int
    row_bytes: int
    fixed_bytes: int

    @classmethod
    def of(cls, n_lists: int, n_features: int, m: int, dtype: np.dtype[np.generic], device: torch.device) -> Tiling:
        """For the ``m`` nearest of ``n_lists`` centroids of rows of ``dtype``."""
        points = 4 * n_lists * (n_features + 1)
        if not fused(dtype, device):
            # Tiles begin at multiples of a power of two by shape alone, whatever the chunks: these change no bit.
            least, most = _TILE_ROWS[device.type]
            rows = _power_of_two(_TILE_VALUES[device.type] // max(n_lists, m * n_features), least, most)
            return cls(n_lists, rows, rows, 4 * (2 * n_lists + 2 * n_features + 3 * m * n_features), points)
        from streamgmm.kernels.neighbours.search import Search

        # A row's result is its own, so the limit on memory may cut anywhere.
        row, column = Search.scratch_bytes(n_lists, n_features, m, architecture_of(device))
        least, most = _FUSED_ROWS
        return cls(n_lists, least, _power_of_two(_FUSED_BYTES // row, least, most), row, points + column)


def _power_of_two(rows: int, least: int, most: int) -> int:
    return min(max(1 << max(rows, 1).bit_length() - 1, least), most)


def chunk_rows(source: Source, tiling: Tiling, m: int, settings: InferenceSettings, workers: int) -> int:
    """Rows moved at once within the memory limit; a multiple or a fraction of a block.

    Raises
    ------
    RequestError
        Even one granule does not fit; the message gives the limit that would do.
    """
    n, d = source.shape
    row_bytes = d * source.dtype.itemsize
    buffers = DEVICE_BUFFERS if settings.device.type == "cuda" else SLOTS
    results = m * (8 + 4 + 4)
    granule = tiling.granule

    def needed(rows: int) -> int:
        tile = min(n, max(rows, granule), tiling.most_rows) * tiling.row_bytes
        fixed = workers * tile + tiling.fixed_bytes + _RUNTIME_BYTES
        return fixed + min(rows, n) * (buffers * row_bytes + 4 * results)

    ours = max(_CHUNK_BYTES[settings.device.type] // (row_bytes + results), source.read_granule)
    rows = round_chunk_rows(max(settings.chunk_rows or ours, granule), granule)
    limit = settings.memory_limit
    while limit is not None and needed(rows) > limit and rows > granule:
        rows = round_chunk_rows(max(rows // 2, granule), granule)
    if limit is not None and needed(rows) > limit:
        raise RequestError(
            f"memory limit {format_bytes(limit)} is too small for {tiling.n_lists} centroids of {d} features: at least "
            f"{-(-needed(granule) >> 20)} MiB is needed; raise --memory (memory_limit)"
        )
    return rows
