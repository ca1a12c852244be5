"""The E-step's kernels: one signature, chosen once.

``reference`` is the textbook in fp64; ``tiled`` is fast matrix products on any device; ``fused`` is Triton on GPUs.
None of them writes down an N×K matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Run(NamedTuple):
    """Rows [start, stop) of a call, and the statistics that they are added to."""

    start: int
    stop: int
    statistics: Statistics


class TopComponents(NamedTuple):
    """The most responsible components of some rows, on the rows' device.

    Attributes
    ----------
    log_likelihood : (n,) fp64 tensor
        log p(x), nats in the data's units.
    labels : (n, m) int32 tensor
        Best first; ties go to the lower index.
    resp : (n, m) fp32 tensor
        Their responsibilities.
    """

    log_likelihood: Tensor
    labels: Tensor
    resp: Tensor


class Kernel(Protocol):
    """What every kernel offers. ``parameters`` below is whatever the method of that name returns.

    A *hard* kernel assigns, as k-means does: the component of greatest log joint density (the lower index of equals)
    has responsibility 1 and the others 0, and that density takes the place of log p(x) everywhere.
    """

    def granule(self, problem: Problem) -> int:
        """Rows whose sum is one fp32 accumulation; a power of two that divides a block.

        Sums of granules are added in fp64, in row order, so chunks may end at any granule without changing a bit.
        """
        ...

    def scratch_bytes(self, problem: Problem, rows: int, workers: int, top: int = 0) -> int:
        """Device memory taken besides the rows, their parameters, the statistics and results, for chunks of ``rows``.

        ``top`` components a row are ranked; 0 where `top` is not called.
        """
        ...

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> Any:
        """``mixture`` in the form the kernel multiplies by: once a pass."""
        ...

    def accumulate(self, rows: Tensor, parameters: Any, statistics: Statistics, weights: Tensor | None = None) -> None:
        """Add the rows' statistics, in the kernel's coordinates about their origin, to ``statistics`` in place.

        ``rows`` (n, D) of a stored type lie on the statistics' device and begin at a granule. ``weights`` (n,) fp64 or
        fp32, at least 0 and of order one, lie there too: each row then counts as that many, in ``n_rows`` as well.
        """
        ...

    def finish(self, statistics: Statistics, parameters: Any) -> Statistics:
        """What `accumulate` added up, in the frame's coordinates about its origin: once a segment."""
        ...

    def log_likelihood(self, rows: Tensor, parameters: Any) -> Tensor:
        """log p(x) of each row, (n,) fp64, nats in the data's units."""
        ...

    def top(self, rows: Tensor, parameters: Any, m: int) -> TopComponents:
        """The ``m`` most responsible components of each row, 1 ≤ m ≤ K."""
        ...


def available_precisions(problem: Problem, device: torch.device, hard: bool = False) -> tuple[str, ...]:
    """The precisions that `select_kernel` can meet on a device, narrowest first: what ``auto`` chooses from."""
    return tuple(precision for precision in PRECISIONS if _obstacle(problem, precision, device, hard) is None)


def select_kernel(
    problem: Problem, precision: str, device: torch.device, workers: int = 1, hard: bool = False
) -> Kernel:
    """The kernel for a device and a working precision. What cannot be met raises: there is no silent fall-back.

    Raises
    ------
    RequestError
        ``precision`` is unknown, or not among the `available_precisions`.
    """
    from streamgmm.kernels.tiled import TILE_BYTES, TiledKernel

    if precision not in PRECISIONS:
        raise RequestError(f"precision must be auto, {', '.join(PRECISIONS)}; got {precision!r}")
    if (obstacle := _obstacle(problem, precision, device, hard)) is not None:
        raise RequestError(obstacle)
    if device.type == "cuda" and precision != "highest":
        if problem.covariance_type != "full":
            from streamgmm.kernels.fused.configs import architecture_of
            from streamgmm.kernels.fused.kernel import TritonKernel

            return TritonKernel(precision, hard, architecture_of(device))
        if precision == "medium":
            from streamgmm.kernels.fused.full_kernel import FullKernel

            return FullKernel()
        # `high` of ``full`` is fp64: natural parameters cancel in fp32, and fp64 tensor cores are as fast as fp32 split
        # in three.
        return TiledKernel(torch.float64, workers, hard, TILE_BYTES[device.type])
    dtype = torch.float64 if precision == "highest" else torch.float32
    return TiledKernel(dtype, workers, hard, TILE_BYTES[device.type])


def _obstacle(problem: Problem, precision: str, device: torch.device, hard: bool) -> str | None:
    """Why a precision cannot be met, and what can; None where it can."""
    if device.type != "cuda" or precision == PRECISIONS[-1] or problem.covariance_type != "full":
        return None
    from streamgmm.kernels.fused.full_parameters import MAX_FEATURES, too_many_features

    if problem.n_features > MAX_FEATURES:
        return too_many_features(problem, precision)
    if hard and precision == "medium":
        return (
            "covariance_type='full' at precision='medium' has no hard assignment on a GPU; use precision='high' or "
            "'auto', or covariance_type='diag'"
        )
    return None
