"""Mixtures of type ``full`` in the form that `full` multiplies by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import log, pi, sqrt

import numpy as np
import torch
from torch import Tensor

from streamgmm.errors import RequestError
from streamgmm.frame import Frame
from streamgmm.kernels import Problem
from streamgmm.kernels.fused.configs import stride_of
from streamgmm.kernels.tiled import TiledKernel, TiledParameters
from streamgmm.mixture import Mixture

MAX_FEATURES = 256
"""A row of this many fp16 features is the most that stays resident beside a component's blocks."""

PADDED_COMPONENTS = 8
"""K' is a multiple: what the narrowest blocks put side by side in one product."""

SIDE = 64
"""Features of a block of the triangle; narrower rows are one block."""

WIDEST = TiledKernel(torch.float64)
"""What takes the granules that fp16 cannot hold or fp32 cannot resolve."""

_LOG2E = 1.4426950408889634
# Σ(y − b)² with this factor in y is ½‖·‖² in bits.
_HALF_BITS = sqrt(0.5 * _LOG2E)
# The largest entry of a factor lies in [2¹⁴, 2¹⁵): fp16 then keeps full precision 2²⁸ below it.
_TOP_EXPONENT = 15
# 2^{2e} itself must stay a normal fp32 number.
_LARGEST_EXPONENT = 60
# |x' − c| must stay below 2⁹ with |x'| ≤ 255.
_LARGEST_CENTRE = 255.0
_FACTORISED_BYTES = 32 << 20
# With fewer components than this, bounds cost more than the products they save.
_SCREENED_COMPONENTS = 16


@dataclass(frozen=True, eq=False)
class Factors:
    """h, b, α and c of `full`, padded to K' components and D' features; padding has α = −inf and zeros elsewhere.

    Attributes
    ----------
    blocks : (K', T, side, side) fp16 tensor
        The T blocks of h that hold its upper triangle, column of blocks by column.
    offsets : (K', D') fp32 tensor
        b, from the rounded h.
    squares, constants : (K',) fp32 tensors
        2^{2e}, and α in bits; α is that of the rounded h too, and NaN where a diagonal entry was rounded to zero.
    centres : (K', D') fp16 tensor
        c: the means in the frame, rounded.
    order : (D',) int32 tensor
        The features in the order that h and b have them in; x' and c keep the data's.
    """

    blocks: Tensor
    offsets: Tensor
    squares: Tensor
    constants: Tensor
    centres: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class FullParameters:
    """A mixture and its frame on a device, in each form that a pass turns out to need."""

    mixture: Mixture
    frame: Frame
    device: torch.device

    @property
    def problem(self) -> Problem:
        m = self.mixture
        return Problem(m.n_components, m.n_features, m.covariance_type)

    @cached_property
    def factors(self) -> Factors:
        """For fp16 rows."""
        return _factors(self.mixture, self.frame, self.device)

    @cached_property
    def double(self) -> TiledParameters:
        """For the granules that need fp64."""
        return WIDEST.parameters(self.mixture, self.frame, self.device)

    @cached_property
    def origins(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        """Shift and scale, padded to (D',), in the types that rows are centred in."""
        stride = stride_of(self.mixture.n_features)
        shift, scale = (
            _padded(torch.tensor(values, device=self.device), stride) for values in (self.frame.shift, self.frame.scale)
        )
        return {dtype: (shift.to(dtype), scale.to(dtype)) for dtype in (torch.float32, torch.float64)}


def check_features(problem: Problem) -> None:
    """Raise a `RequestError` where a row is too wide for the kernel."""
    if problem.n_features > MAX_FEATURES:
        raise RequestError(too_many_features(problem, "medium"))


def too_many_features(problem: Problem, precision: str) -> str:
    """What to tell a user whose rows are wider than `MAX_FEATURES`."""
    return (
        f"covariance_type='full' at precision={precision!r} takes at most {MAX_FEATURES} features on a GPU; got "
        f"{problem.n_features}; use precision='highest' or 'auto', or covariance_type='diag'"
    )


def padded_components(n_components: int) -> int:
    """K'."""
    return -(-n_components // PADDED_COMPONENTS) * PADDED_COMPONENTS


def side_of(problem: Problem) -> int:
    """Features of a block of h."""
    return min(SIDE, stride_of(problem.n_features))


def screens(problem: Problem) -> bool:
    """Whether pairs are bounded by their first block of features before their logits are completed."""
    return stride_of(problem.n_features) > SIDE and problem.n_components >= _SCREENED_COMPONENTS


def n_blocks(stride: int, side: int) -> int:
    """T: blocks of an upper triangle."""
    return stride // side * (stride // side + 1) // 2


def parameter_bytes(problem: Problem) -> int:
    """Device memory of `FullParameters`: factors, the matrices they come from, and fp64 coefficients."""
    k, d, stride, side = padded_components(problem.n_components), problem.n_features, *_shape(problem)
    factors = k * (2 * n_blocks(stride, side) * side**2 + 6 * stride + 8) + 4 * stride
    factorised = 8 * min(k, _matrices_at_once(d)) * 4 * stride**2
    return factors + factorised + 8 * k * (d * (d + 1) // 2 + d + 1)


def _shape(problem: Problem) -> tuple[int, int]:
    return stride_of(problem.n_features), side_of(problem)


def _matrices_at_once(n_features: int) -> int:
    return max(1, _FACTORISED_BYTES // (8 * n_features**2))


def _factors(mixture: Mixture, frame: Frame, device: torch.device) -> Factors:
    problem = Problem(mixture.n_components, mixture.n_features, mixture.covariance_type)
    k, (stride, side) = padded_components(problem.n_components), _shape(problem)
    order = _feature_order(mixture) if screens(problem) else np.arange(problem.n_features)
    factors = Factors(
        blocks=torch.zeros((k, n_blocks(stride, side), side, side), dtype=torch.float16, device=device),
        offsets=torch.zeros((k, stride), dtype=torch.float32, device=device),
        squares=torch.ones(k, dtype=torch.float32, device=device),
        constants=torch.full((k,), -torch.inf, dtype=torch.float32, device=device),
        centres=torch.zeros((k, stride), dtype=torch.float16, device=device),
        order=torch.tensor(np.append(order, np.arange(len(order), stride)), dtype=torch.int32, device=device),
    )
    with np.errstate(divide="ignore"):
        log_weights = np.log(mixture.weights)
    base = torch.tensor(log_weights + frame.log_volume - 0.5 * problem.n_features * log(2 * pi), device=device)
    means = torch.tensor((mixture.means - frame.shift) * frame.scale, device=device)
    factors.centres[: len(means), : problem.n_features] = means.clamp(-_LARGEST_CENTRE, _LARGEST_CENTRE)
    means = means[:, factors.order[: problem.n_features].long()]
    for own, upper in _precision_factors(mixture, frame, order, device):
        scaled = upper * _HALF_BITS
        # The factor is triangular: its largest entry may lie off the diagonal.
        _, exponents = torch.frexp(scaled.abs().amax((1, 2)))
        exponents = (exponents - _TOP_EXPONENT).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        half = torch.ldexp(scaled, -exponents[:, None, None]).to(torch.float16)
        exact = half.double()
        diagonal = torch.ldexp(exact.diagonal(dim1=1, dim2=2), exponents[:, None]) / _HALF_BITS
        # A zero on the diagonal would silently empty its component; NaN surfaces in the likelihood instead.
        log_det = torch.where(diagonal > 0, diagonal, torch.nan).log().sum(1)
        factors.blocks[own] = _triangle(_padded(half, stride, stride), side)
        factors.offsets[own, : problem.n_features] = (means[own, None] @ exact)[:, 0].float()
        factors.squares[own] = torch.exp2(2.0 * exponents)
        factors.constants[own] = (_LOG2E * (base[own] + log_det)).float()
    return factors


def _feature_order(mixture: Mixture) -> np.ndarray:
    """Features, (D,), those first that tell components apart: the variance of the means over that about them.

    Fisher's criterion (1936), one feature at a time: the first block of h is then the best bound that costs no search.
    """
    weights = mixture.weights[:, None]
    means = (weights * mixture.means).sum(axis=0)
    between = (weights * (mixture.means - means) ** 2).sum(axis=0)
    within = (weights * np.diagonal(mixture.covariances, axis1=1, axis2=2)).sum(axis=0)
    return np.argsort(-between / within, kind="stable")


def _precision_factors(
    mixture: Mixture, frame: Frame, order: np.ndarray, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """U (k, D, D) fp64 with U Uᵀ = P in the frame, upper triangular in ``order``, some components at a time."""
    d = mixture.n_features
    scale = torch.tensor(frame.scale[order], device=device)
    identity = torch.eye(d, dtype=torch.float64, device=device)
    for first in range(0, mixture.n_components, step := _matrices_at_once(d)):
        own = slice(first, min(first + step, mixture.n_components))
        covariances = torch.tensor(mixture.covariances[own][:, order][:, :, order], device=device)
        covariances *= scale[:, None] * scale
        lower, failed = torch.linalg.cholesky_ex(covariances)
        if failed.any():
            raise RequestError("covariances must be positive definite; raise reg_covar")
        yield own, torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False).mT


def _triangle(matrices: Tensor, side: int) -> Tensor:
    """(k, T, side, side): the blocks (i, j ≥ i) of (k, D', D') at j(j+1)/2 + i."""
    n = matrices.shape[-1] // side
    blocks = matrices.reshape(-1, n, side, n, side).transpose(2, 3)
    j, i = torch.tril_indices(n, n, device=matrices.device)
    return blocks[:, i, j]


def _padded(values: Tensor, *shape: int) -> Tensor:
    """``values`` with zeros behind, to ``shape`` in the last dimensions."""
    behind = [new - old for new, old in zip(shape, values.shape[-len(shape) :], strict=True)]
    return torch.nn.functional.pad(values, [side for size in reversed(behind) for side in (0, size)])
