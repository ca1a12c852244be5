"""Results on their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Arriving:
    """Copies of ``tensors`` on the host, in pinned memory that is theirs, complete once ``arrived`` has happened."""

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    @classmethod
    def sent(cls, *tensors: Tensor) -> Arriving:
        """Send them without waiting, so that work enqueued from now on hides the way; all of one device."""
        if not tensors[0].is_cuda:
            return cls(tensors, None)
        host = tuple(torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors)
        for target, one in zip(host, tensors, strict=True):
            target.copy_(one, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived)

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors
