"""Streams rows past the centroids: a chunk's nearest centroids, in memory that no number of rows changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamgmm.ann.policies import Candidates
from streamgmm.ann.quantizer import Float32Array, Quantizer
from streamgmm.device import compute_workers
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.plan import Span, plan_chunks, round_chunk_rows
from streamgmm.io.ring import DEVICE_BUFFERS, SLOTS, Ring
from streamgmm.io.sources.base import Source
from streamgmm.parallel import map_in_order
from streamgmm.seeding import check_finite
from streamgmm.units import format_bytes

_TILE_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores, or residuals, of one tile."""

_TILE_ROWS = {"cpu": (64, 4096), "cuda": (1024, 65_536)}

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_RUNTIME_BYTES = 24 << 20


@dataclass(frozen=True, eq=False)
class Centroids:
    """Centroids on a device, about their own mean: ‖x − c‖² loses less to rounding there.

    Attributes
    ----------
    points : (K, D) fp32 tensor
    half_norms : (K,) fp32 tensor
    shift : (D,) fp64 tensor
        The mean.
    """

    points: Tensor
    half_norms: Tensor
    shift: Tensor

    @classmethod
    def of(cls, centroids: Float32Array, device: torch.device) -> Centroids:
        exact = torch.as_tensor(centroids.astype(np.float64), device=device)
        shift = exact.mean(0)
        points = (exact - shift).float()
        return cls(points, 0.5 * (points.double() ** 2).sum(1).float(), shift)

    def centred(self, rows: Tensor) -> Tensor:
        """Rows of any stored type as fp32 about the mean."""
        if rows.dtype == torch.float64:
            return (rows - self.shift).float()
        return rows.float() - self.shift.float()


def nearest(rows: Tensor, centroids: Centroids, m: int) -> Candidates:
    """The ``m`` nearest centroids of each of a tile of rows."""
    x = centroids.centred(rows)
    # ½‖x − c‖² − ½‖x‖²: what ranks the centroids.
    scores = torch.addmm(centroids.half_norms, x, centroids.points.T, alpha=-1)
    # Ascending, so that the stable sort below gives ties to the lower index.
    lists = (
        scores.argmin(1, keepdim=True) if m == 1 else scores.topk(m, largest=False, sorted=False).indices.sort(1).values
    )
    residuals = x[:, None] - centroids.points[lists]
    distances = torch.einsum("nmd,nmd->nm", residuals, residuals)
    order = distances.argsort(dim=1, stable=True)
    own = residuals[torch.arange(len(x), device=x.device), order[:, 0]]
    inner = torch.einsum("nmd,nd->nm", residuals, own)
    lists, distances, inner = (part.gather(1, order) for part in (lists, distances, inner))
    return Candidates(lists, distances, inner)


@dataclass(frozen=True, eq=False)
class NearestChunk:
    """A chunk's rows on the device, valid until the next is asked for, and their candidates there."""

    span: Span
    rows: Tensor
    candidates: Candidates


def stream_nearest(
    source: Source,
    quantizer: Quantizer,
    m: int,
    settings: InferenceSettings,
    start: int = 0,
) -> Iterator[NearestChunk]:
    """The ``m`` nearest centroids of every row from ``start`` on, in order.

    Raises
    ------
    RequestError
        Dimensions disagree, or the memory limit cannot be met.
    DataError
        A row holds NaN or infinity; file, row and column are named.
    """
    quantizer.check_features(source.name, source.shape[1])
    device = settings.device
    m = min(m, quantizer.n_lists)
    workers = compute_workers(device)
    tile = tile_rows(quantizer.n_lists, source.shape[1], m, device)
    rows_at_once = chunk_rows(source, quantizer.n_lists, m, settings, workers)
    centroids = Centroids.of(quantizer.centroids, device)
    with Ring(source, rows_at_once, device, settings.threads) as ring:
        for chunk in ring.stream(plan_chunks(source.shape[0], rows_at_once, start)):
            tiles = chunk.rows.split(tile)

            def of_tile(tile: Tensor) -> Candidates:
                return nearest(tile, centroids, m)

            found = list(map_in_order(of_tile, tiles, workers) if device.type == "cpu" else map(of_tile, tiles))
            parts = zip(*((one.lists, one.distances, one.inner) for one in found), strict=True)
            candidates = Candidates(*(torch.cat(part) for part in parts))
            if not torch.isfinite(candidates.distances).all():
                _explain(source, chunk.span)
            yield NearestChunk(chunk.span, chunk.rows, candidates)


def tile_rows(n_lists: int, n_features: int, m: int, device: torch.device) -> int:
    """Rows of one product, a power of two by shape alone.

    Tiles begin at multiples of it within a segment, whatever the chunks, and these therefore change no bit.
    """
    least, most = _TILE_ROWS[device.type]
    rows = _TILE_VALUES[device.type] // max(n_lists, m * n_features)
    return min(max(1 << max(rows, 1).bit_length() - 1, least), most)


def chunk_rows(source: Source, n_lists: int, m: int, settings: InferenceSettings, workers: int) -> int:
    """Rows moved at once within the memory limit; a multiple or a fraction of a block.

    Raises
    ------
    RequestError
        Even one tile a worker does not fit; the message gives the limit that would do.
    """
    n, d = source.shape
    row_bytes = d * source.dtype.itemsize
    buffers = DEVICE_BUFFERS if settings.device.type == "cuda" else SLOTS
    results = m * (8 + 4 + 4)
    granule = tile_rows(n_lists, d, m, settings.device)
    tile = min(n, granule) * 4 * (2 * n_lists + 2 * d + 3 * m * d)

    def needed(rows: int) -> int:
        rows = min(rows, n)
        fixed = workers * tile + 4 * n_lists * (d + 1) + _RUNTIME_BYTES
        return fixed + rows * (buffers * row_bytes + 4 * results)

    ours = max(_CHUNK_BYTES[settings.device.type] // (row_bytes + results), source.read_granule)
    rows = round_chunk_rows(max(settings.chunk_rows or ours, granule), granule)
    limit = settings.memory_limit
    while limit is not None and needed(rows) > limit and rows > granule:
        rows = round_chunk_rows(max(rows // 2, granule), granule)
    if limit is not None and needed(rows) > limit:
        raise RequestError(
            f"memory limit {format_bytes(limit)} is too small for {n_lists} centroids of {d} features: at least "
            f"{-(-needed(granule) >> 20)} MiB is needed; raise --memory (memory_limit)"
        )
    return rows


def _explain(source: Source, span: Span) -> None:
    check_finite(source, source.read(span.start, span.stop), np.arange(span.start, span.stop))
    raise RequestError(
        f"{source.name}: a distance in rows {span.start} to {span.stop} overflows float32; scale the data"
    )
