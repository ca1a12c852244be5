"""The lists of streamed rows on the host, while the device is at work on the next ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.ann.nearest import Centroids, explain, finder, search_of, stream_tiles
from streamgmm.ann.policies import Policy, lists_of
from streamgmm.ann.quantizer import Quantizer
from streamgmm.ann.tiling import fused
from streamgmm.arriving import Arriving
from streamgmm.inference import InferenceSettings
from streamgmm.io.plan import Span
from streamgmm.io.sources.base import Source

if TYPE_CHECKING:
    from streamgmm.kernels.neighbours.search import Choice


@dataclass(frozen=True, eq=False)
class Listed:
    """Lists of some rows (n, columns) int32, and whether the distances they come from are finite, one bool."""

    lists: Tensor
    finite: Tensor


def lister(centroids: Centroids, dtype: np.dtype[np.generic], m: int, policy: Policy) -> Callable[[Tensor], Listed]:
    """What gives `lists_of` of the ``m`` ≤ K nearest centroids, for rows of ``dtype``; see `finder`."""
    if not fused(dtype, centroids.points.device):
        find = finder(centroids, dtype)

        def plainly(rows: Tensor) -> Listed:
            found = find(rows, m=m)
            return Listed(lists_of(found, policy), torch.isfinite(found.distances).all())

        return plainly
    search, choice = search_of(centroids), choice_of(policy, m)

    def at_once(rows: Tensor) -> Listed:
        lists, gains = search.lists(rows, m, choice)
        return Listed(lists, ~torch.isnan(gains).any())

    return at_once


def choice_of(policy: Policy, m: int) -> Choice:
    """``policy`` among ``m`` candidates, as the kernel takes it."""
    from streamgmm.kernels.neighbours.search import Choice

    columns = min(policy.width, m)
    return Choice(columns, policy.name if columns == 2 else "top2", policy.lam, policy.gate)


@dataclass(frozen=True, eq=False)
class _Sent:
    """A chunk's lists, and whether its rows are finite, on their way to the host."""

    span: Span
    arriving: Arriving

    @classmethod
    def of(cls, span: Span, found: list[Listed]) -> _Sent:
        lists = torch.cat([one.lists for one in found])
        return cls(span, Arriving.sent(lists, torch.stack([one.finite for one in found]).all()))

    def wait(self, source: Source) -> tuple[int, NDArray[np.int32]]:
        """First row and lists, once they are there."""
        lists, finite = self.arriving.wait()
        if not finite:
            explain(source, self.span)
        return self.span.start, lists.numpy()


def stream_lists(
    source: Source, quantizer: Quantizer, m: int, policy: Policy, settings: InferenceSettings, start: int = 0
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """First row, and lists (n, columns) int32, of every chunk from row ``start`` on: among the ``m`` nearest each.

    The device is given a chunk before the lists of the one before it are waited for. Raises as `stream_nearest`.
    """
    width = min(m, quantizer.n_lists)

    def prepare(centroids: Centroids) -> Callable[[Tensor], Listed]:
        return lister(centroids, source.dtype, width, policy)

    before: _Sent | None = None
    for span, _, found in stream_tiles(source, quantizer, width, settings, start, prepare):
        sent = _Sent.of(span, found)
        if before is not None:
            yield before.wait(source)
        before = sent
    if before is not None:
        yield before.wait(source)
