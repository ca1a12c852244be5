"""The lists of streamed rows on the host, while the device is at work on the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.ann.nearest import NearestChunk, explain, stream_unchecked
from streamgmm.ann.policies import Policy, lists_of
from streamgmm.ann.quantizer import Quantizer
from streamgmm.inference import InferenceSettings
from streamgmm.io.plan import Span
from streamgmm.io.sources.base import Source


@dataclass(frozen=True, eq=False)
class _Sent:
    """A chunk's lists, and whether its rows are finite, on their way to the host."""

    span: Span
    lists: Tensor
    finite: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, part: NearestChunk, policy: Policy) -> _Sent:
        lists, finite = lists_of(part.candidates, policy), part.finite
        if not lists.is_cuda:
            return cls(part.span, lists, finite, None)
        host_lists, host_finite = (_sent(tensor) for tensor in (lists, finite))
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(part.span, host_lists, host_finite, arrived)

    def wait(self, source: Source) -> tuple[int, NDArray[np.int32]]:
        """First row and lists, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if not self.finite:
            explain(source, self.span)
        return self.span.start, self.lists.numpy()


def _sent(tensor: Tensor) -> Tensor:
    """Pinned memory to which ``tensor`` is on its way, the caller's for as long as it holds it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def stream_lists(
    source: Source, quantizer: Quantizer, m: int, policy: Policy, settings: InferenceSettings, start: int = 0
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """First row, and lists (n, columns) int32, of every chunk from row ``start`` on: among the ``m`` nearest each.

    The device is given a chunk before the lists of the one before it are waited for. Raises as `stream_nearest`.
    """
    before: _Sent | None = None
    for part in stream_unchecked(source, quantizer, m, settings, start):
        sent = _Sent.of(part, policy)
        if before is not None:
            yield before.wait(source)
        before = sent
    if before is not None:
        yield before.wait(source)
