"""Streamed Euclidean distances to centres, in fp64 and without cancellation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamgmm.device import compute_workers
from streamgmm.inference import InferenceSettings, map_chunks
from streamgmm.io.sources.base import Source
from streamgmm.kernels import Kernel, select_kernel
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.parallel import map_in_order
from streamgmm.steps.kmeans import with_centres

_TILE_ROWS = {"cpu": 256, "cuda": 1024}
"""Divides every kernel's granule, so that chunks never cut a row's tile elsewhere: a tile's shape can change bits."""

_PAIRS = 4096
"""Differences of rows and centres that are written out at once."""

_CANCELLED = 1e-6
"""A squared distance below this fraction of the squares it was formed from is formed again, from the difference."""

_COPIES = 4
"""Of a dense tile's distances, while they are formed."""

_hard_kernel = partial(select_kernel, hard=True)


def nearest(
    source: Source, centres: np.ndarray, settings: InferenceSettings
) -> Iterator[tuple[np.ndarray, Float64Array]]:
    """The nearest of ``centres`` (K, D) to each row, (n,) int32, and its squared distance, (n,): a chunk at a time.

    The label comes from a matrix product in the working precision, ties going to the lower index; the distance from
    the difference of the two points.

    Raises
    ------
    DataError
        A row holds NaN or infinity; file, row and column are named.
    RequestError
        The data's dimension is not the centres', or the memory limit cannot be met.
    """
    points = torch.tensor(centres, dtype=torch.float64, device=settings.device)

    def of_rows(kernel: Kernel, rows: Tensor, parameters: Any) -> tuple[Tensor, ...]:
        labels = kernel.top(rows, parameters, 1).labels[:, 0]

        def of_tile(tile: Tensor, tile_labels: Tensor) -> Tensor:
            return ((tile.double() - points[tile_labels.long()]) ** 2).sum(1)

        return _map_tiles(of_tile, rows, labels), labels

    for squares, labels in map_chunks(source, _mixture_of(centres), settings, _hard_kernel, of_rows, 16):
        yield labels.numpy(), squares.numpy()


def distances(source: Source, centres: np.ndarray, settings: InferenceSettings) -> Iterator[Float64Array]:
    """The distance of each row to each of ``centres`` (K, D), (n, K) a chunk. Raises as `nearest`."""
    points = torch.tensor(centres, dtype=torch.float64, device=settings.device)
    origin = points.mean(0)
    centred = points - origin
    norms = (centred**2).sum(1)

    def of_tile(tile: Tensor) -> Tensor:
        tile = tile.double()
        x = tile - origin
        sizes = (x**2).sum(1)[:, None] + norms
        squares = torch.addmm(sizes, x, centred.T, alpha=-2)
        for pairs in (squares < _CANCELLED * sizes).nonzero().split(_PAIRS):
            row, centre = pairs.T
            squares[row, centre] = ((tile[row] - points[centre]) ** 2).sum(1)
        return squares.sqrt_()

    def of_rows(kernel: Kernel, rows: Tensor, parameters: Any) -> tuple[Tensor, ...]:
        return (_map_tiles(of_tile, rows),)

    result_bytes = 8 * _COPIES * len(centres)
    for (found,) in map_chunks(source, _mixture_of(centres), settings, _hard_kernel, of_rows, result_bytes):
        yield found.numpy()


def _map_tiles(function: Callable[..., Tensor], rows: Tensor, *along: Tensor) -> Tensor:
    """``function(tile, ...)`` of the tiles of ``rows``, with the matching pieces of ``along``, joined."""
    step, device = _TILE_ROWS[rows.device.type], rows.device
    pieces = zip(*(tensor.split(step) for tensor in (rows, *along)), strict=True)
    if device.type == "cpu":
        return torch.cat(list(map_in_order(lambda piece: function(*piece), pieces, compute_workers(device))))
    return torch.cat([function(*piece) for piece in pieces])


def _mixture_of(centres: np.ndarray) -> Mixture:
    """The mixture whose hard assignment is to the nearest of ``centres``, in units of their own spread."""
    means = np.asarray(centres, dtype=np.float64)
    return with_centres(means, float(means.var(axis=0).mean()) or 1.0)
