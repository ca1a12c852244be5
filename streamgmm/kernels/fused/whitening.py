"""Coordinates in which the covariance of ``tied`` is one, so that ``spherical`` kernels serve it.

With the precision in the frame's coordinates P = UUᵀ, U upper triangular, y = x'U has unit noise, and

    log w_k p(x) = α_k + y·ν_k − ½‖y‖²,        ν_k = μ'_k U,        α_k = log w_k + log|U| − ½‖ν_k‖² − (D/2) log 2π,

whose last term is common to all components. Rounding y is the same everywhere in units of the noise, whatever the
covariance. Statistics return by Σ r x' = (Σ r y) U⁻¹ and Σ x'x'ᵀ = U⁻ᵀ (Σ yyᵀ) U⁻¹.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels.fused.configs import stride_of
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.statistics import Statistics

_TOP_EXPONENT = 15


@dataclass(frozen=True, eq=False)
class HalfFactor:
    """U as two fp16 numbers an entry.

    Attributes
    ----------
    values : (D, D) fp64 array
        What the two say.
    high, low : (D', D') fp16 tensors
        U, each column by a power of two that brings it below fp16's range.
    exponents : (D',) fp32 tensor
        Those powers, to be multiplied by.
    """

    values: Float64Array
    high: Tensor
    low: Tensor
    exponents: Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """The coordinates that U gives.

    Attributes
    ----------
    factor : (D, D) fp64 array
        U; everything else is derived from it.
    log_volume : float
        log|U| and Σ log c of the frame.
    means : (K, D) fp64 array
        ν.
    """

    factor: Float64Array
    log_volume: float
    means: Float64Array

    @cached_property
    def inverse(self) -> Float64Array:
        """U⁻¹ (D, D)."""
        identity = torch.eye(len(self.factor), dtype=torch.float64)
        return np.asarray(torch.linalg.solve_triangular(torch.from_numpy(self.factor), identity, upper=True))

    def natural(
        self, mixture: Mixture, rounding: Callable[[Float64Array], Float64Array]
    ) -> tuple[Float64Array, Float64Array]:
        """ν (K, D) as rounded, and α (K,) of the rounded ν, nats in the data's units."""
        means = rounding(self.means)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            constants = np.log(mixture.weights) - 0.5 * (means**2).sum(axis=1)
        return means, constants + self.log_volume - 0.5 * mixture.n_features * np.log(2 * np.pi)

    def restore(self, statistics: Statistics) -> Statistics:
        """Statistics of y as statistics of x', about the origin of both."""
        inverse = torch.as_tensor(self.inverse, device=statistics.sums.device)
        return replace(statistics, sums=statistics.sums @ inverse, scatter=inverse.T @ statistics.scatter @ inverse)

    def apply(self, statistics: Statistics) -> Statistics:
        """The inverse of `restore`."""
        factor = torch.as_tensor(self.factor, device=statistics.sums.device)
        return replace(statistics, sums=statistics.sums @ factor, scatter=factor.T @ statistics.scatter @ factor)


def factor_of(mixture: Mixture, frame: Frame) -> Float64Array:
    """U (D, D) of a ``tied`` mixture, for x' of ``frame``."""
    return mixture.precisions_cholesky / frame.scale[:, None]


def whitening_of(mixture: Mixture, frame: Frame, factor: Float64Array) -> Whitening:
    """The coordinates of U as it is multiplied by: `factor_of`, or what `half_factor` makes of it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_volume = frame.log_volume + float(np.log(factor.diagonal()).sum())
    return Whitening(factor, log_volume, ((mixture.means - frame.shift) * frame.scale) @ factor)


def half_factor(exact: Float64Array, device: torch.device) -> HalfFactor:
    """U (D, D) rounded for the kernel."""
    _, exponents = np.frexp(np.abs(exact).max(axis=0))
    exponents = exponents - _TOP_EXPONENT
    with np.errstate(under="ignore"):
        scaled = np.ldexp(exact, -exponents)
        high = scaled.astype(np.float16)
        low = (scaled - high).astype(np.float16)
        values = np.ldexp(high.astype(np.float64) + low.astype(np.float64), exponents)
    d, stride = len(exact), stride_of(len(exact))

    def on_device(array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        whole = np.zeros(shape, array.dtype)
        whole[tuple(slice(0, d) for _ in shape)] = array
        return torch.as_tensor(whole, device=device)

    return HalfFactor(
        values=values,
        high=on_device(high, (stride, stride)),
        low=on_device(low, (stride, stride)),
        exponents=on_device(np.ldexp(1.0, exponents).astype(np.float32), (stride,)),
    )
