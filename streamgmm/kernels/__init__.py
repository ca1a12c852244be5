"""The E-step's kernels: one signature, chosen once.

``reference`` is the textbook in fp64; ``tiled`` is fast matrix products on any device; the ``triton_*`` files are the
fused GPU kernels. None of them writes down an N×K matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from streamgmm.errors import RequestError
from streamgmm.frame import Frame
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

PRECISIONS = ("medium", "high", "highest")
"""Working precisions, narrowest first."""


@dataclass(frozen=True)
class Problem:
    """What a kernel's shapes depend on: never on N, on memory, or on timing."""

    n_components: int
    n_features: int
    covariance_type: str


class Kernel(Protocol):
    """What every kernel offers. ``P`` below is whatever ``parameters`` returns; callers only pass it back."""

    def granule(self, problem: Problem) -> int:
        """Rows whose sum is one fp32 accumulation; a power of two that divides a block.

        Sums of granules are added in fp64, in row order, so chunks may end at any granule without changing a bit.
        """
        ...

    def scratch_bytes(self, problem: Problem, rows: int, workers: int) -> int:
        """Device memory taken besides the rows, their parameters and the statistics, for chunks of ``rows``."""
        ...

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> Any:
        """``mixture`` in the form the kernel multiplies by: once a pass."""
        ...

    def accumulate(self, rows: Tensor, parameters: Any, statistics: Statistics) -> None:
        """Add the rows' statistics, in the frame's coordinates about its origin, to ``statistics`` in place.

        ``rows`` (n, D) of a stored type lie on the statistics' device and begin at a granule.
        """
        ...

    def log_likelihood(self, rows: Tensor, parameters: Any) -> Tensor:
        """log p(x) of each row, (n,) fp64, nats in the data's units."""
        ...


def select_kernel(covariance_type: str, precision: str, device: torch.device, workers: int = 1) -> Kernel:
    """The kernel for a device and a working precision. What cannot be met raises: there is no silent fall-back."""
    from streamgmm.kernels.tiled import TiledKernel

    if precision not in PRECISIONS:
        raise RequestError(f"precision must be auto, {', '.join(PRECISIONS)}; got {precision!r}")
    if device.type == "cuda" and precision != "highest" and covariance_type in ("spherical", "diag"):
        from streamgmm.kernels.triton_estep import TritonKernel

        return TritonKernel(precision)
    return TiledKernel(torch.float64 if precision == "highest" else torch.float32, workers)
