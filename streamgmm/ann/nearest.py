"""Streams rows past the centroids: a chunk's nearest centroids, in memory that no number of rows changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from streamgmm.ann.policies import Candidates
from streamgmm.ann.quantizer import Float32Array, Quantizer
from streamgmm.ann.tiling import Tiling, chunk_rows, fused
from streamgmm.device import compute_workers
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.plan import Span, plan_chunks
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.kernels.fused.configs import architecture_of
from streamgmm.parallel import map_in_order
from streamgmm.seeding import check_finite

if TYPE_CHECKING:
    from streamgmm.kernels.neighbours.search import Search

Found = TypeVar("Found")


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


class Finder(Protocol):
    """The ``m`` nearest centroids of each of some rows."""

    def __call__(self, rows: Tensor, /, *, m: int) -> Candidates: ...


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


def finder(centroids: Centroids, dtype: np.dtype[np.generic]) -> Finder:
    """What finds the nearest centroids of rows of ``dtype`` where the centroids are, with `nearest`'s result.

    On a GPU with Triton, whose products of fp16 are many times as fast, `kernels.neighbours.search` says in what its
    result may differ; float64 rows are taken the plain way.
    """
    if not fused(dtype, centroids.points.device):
        return partial(nearest, centroids=centroids)
    search = search_of(centroids)

    def find(rows: Tensor, *, m: int) -> Candidates:
        return Candidates(*search(rows, m))

    return find


def search_of(centroids: Centroids) -> Search:
    """What finds them in Triton, where they are."""
    from streamgmm.kernels.neighbours.search import Search

    return Search.of(centroids.points, centroids.shift, architecture_of(centroids.points.device))


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
    width = min(m, quantizer.n_lists)

    def prepare(centroids: Centroids) -> Callable[[Tensor], Candidates]:
        return partial(finder(centroids, source.dtype), m=width)

    for span, rows, found in stream_tiles(source, quantizer, width, settings, start, prepare):
        parts = zip(*((one.lists, one.distances, one.inner) for one in found), strict=True)
        candidates = found[0] if len(found) == 1 else Candidates(*(torch.cat(part) for part in parts))
        if not torch.isfinite(candidates.distances).all():
            explain(source, span)
        yield NearestChunk(span, rows, candidates)


def stream_tiles(
    source: Source,
    quantizer: Quantizer,
    m: int,
    settings: InferenceSettings,
    start: int,
    prepare: Callable[[Centroids], Callable[[Tensor], Found]],
) -> Iterator[tuple[Span, Tensor, list[Found]]]:
    """Each chunk's span, its rows on the device, and what ``prepare``'s result finds for each of its tiles.

    ``m`` ≤ K centroids a row must fit the memory limit. Nothing here waits for a GPU. Raises as `stream_nearest`, but
    does not look at what is found.
    """
    quantizer.check_features(source.name, source.shape[1])
    device = settings.device
    workers = compute_workers(device)
    tiling = Tiling.of(quantizer.n_lists, source.shape[1], m, source.dtype, device)
    rows_at_once = chunk_rows(source, tiling, m, settings, workers)
    find = prepare(Centroids.of(quantizer.centroids, device))
    with Ring(source, rows_at_once, device, settings.threads) as ring:
        for chunk in ring.stream(plan_chunks(source.shape[0], rows_at_once, start)):
            tiles = chunk.rows.split(tiling.most_rows)
            found = list(map_in_order(find, tiles, workers) if device.type == "cpu" else map(find, tiles))
            yield chunk.span, chunk.rows, found


def explain(source: Source, span: Span) -> None:
    """Raise what is wrong with rows whose distances are not finite."""
    check_finite(source, source.read(span.start, span.stop), np.arange(span.start, span.stop))
    raise RequestError(
        f"{source.name}: a distance in rows {span.start} to {span.stop} overflows float32; scale the data"
    )
