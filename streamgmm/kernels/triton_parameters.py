"""Mixtures in the form that the Triton kernels multiply by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem
from streamgmm.kernels.natural import natural_parameters
from streamgmm.kernels.tiled import TiledKernel, TiledParameters
from streamgmm.kernels.triton_configs import COMPONENT_PADDING, stride_of
from streamgmm.mixture import Float64Array, Mixture

WIDEST = TiledKernel(torch.float64)
"""What takes the granules that fp32 cannot resolve."""

_LOG2E = 1.4426950408889634
# The largest coefficient of a component lies in [2¹⁴, 2¹⁵): fp16 then keeps full precision 2²⁸ below it.
_TOP_EXPONENT = 15


@dataclass(frozen=True, eq=False)
class Coefficients:
    """θ and α in bits, padded to whole tiles; padding has α = −inf and zeros elsewhere.

    Attributes
    ----------
    linear : (K', D') fp16 or fp32 tensor
        2^{−e_k} log₂e · θ.
    quadratic : tensor
        ``diag`` (K', D') as ``linear``; ``spherical`` (K',) fp32, log₂e · (−p/2), without the exponent.
    exponents, constants : (K',) fp32 tensors
        2^{e_k}, and log₂e · α_k.
    """

    linear: Tensor
    quadratic: Tensor
    exponents: Tensor
    constants: Tensor


@dataclass(frozen=True, eq=False)
class TritonParameters:
    """A mixture and its frame on a device, in each working type that a pass turns out to need."""

    mixture: Mixture
    frame: Frame
    device: torch.device

    @property
    def problem(self) -> Problem:
        m = self.mixture
        return Problem(m.n_components, m.n_features, m.covariance_type)

    @property
    def is_diag(self) -> bool:
        return self.mixture.covariance_type == "diag"

    @cached_property
    def half(self) -> Coefficients:
        """For fp16 rows."""
        return _coefficients(self.mixture, self.frame, self.device, torch.float16)

    @cached_property
    def single(self) -> Coefficients:
        """For fp32 rows."""
        return _coefficients(self.mixture, self.frame, self.device, torch.float32)

    @cached_property
    def double(self) -> TiledParameters:
        """For the granules that need fp64."""
        return WIDEST.parameters(self.mixture, self.frame, self.device)

    @cached_property
    def origins(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        """Shift and scale, padded to (D',), in the types that rows are centred in."""
        shape = (stride_of(self.mixture.n_features),)
        shift, scale = (
            torch.as_tensor(_padded(values, shape), device=self.device)
            for values in (self.frame.shift, self.frame.scale)
        )
        return {dtype: (shift.to(dtype), scale.to(dtype)) for dtype in (torch.float32, torch.float64)}


def _coefficients(mixture: Mixture, frame: Frame, device: torch.device, dtype: torch.dtype) -> Coefficients:
    diag = mixture.covariance_type == "diag"
    exponents = _exponents(mixture, frame) if dtype == torch.float16 else np.zeros(mixture.n_components, np.int64)

    def in_fp32(values: Float64Array) -> Float64Array:
        return (values * _LOG2E).astype(np.float32).astype(np.float64) / _LOG2E

    def in_fp16(values: Float64Array) -> Float64Array:
        # The kernel multiplies a spherical precision, one number a component, by the norm in fp32.
        if not diag and values.shape[1] < mixture.n_features:
            return in_fp32(values)
        scaled = np.ldexp(values * _LOG2E, -exponents[:, None]).astype(np.float16).astype(np.float64)
        return np.asarray(np.ldexp(scaled, exponents[:, None]) / _LOG2E)

    natural = natural_parameters(mixture, frame, in_fp16 if dtype == torch.float16 else in_fp32)
    # A precision that rounds to zero would silently empty its component; NaN surfaces in the likelihood instead.
    constants = np.where((natural.quadratic == 0).any(axis=1), np.nan, natural.constants)

    n_padded = -(-mixture.n_components // COMPONENT_PADDING) * COMPONENT_PADDING
    stride = stride_of(mixture.n_features)

    def on_device(values: Float64Array, shape: tuple[int, ...], kind: torch.dtype, fill: float = 0.0) -> Tensor:
        return torch.as_tensor(_padded(values, shape, fill), device=device).to(kind)

    def product_form(values: Float64Array) -> Tensor:
        with np.errstate(invalid="ignore"):
            scaled = np.ldexp(values * _LOG2E, -exponents[:, None])
        return on_device(scaled, (n_padded, stride), dtype)

    if diag:
        quadratic = product_form(natural.quadratic)
    else:
        quadratic = on_device(natural.quadratic[:, 0] * _LOG2E, (n_padded,), torch.float32)
    return Coefficients(
        linear=product_form(natural.linear),
        quadratic=quadratic,
        exponents=on_device(np.ldexp(1.0, exponents), (n_padded,), torch.float32, 1.0),
        constants=on_device(constants * _LOG2E, (n_padded,), torch.float32, -np.inf),
    )


def _exponents(mixture: Mixture, frame: Frame) -> np.ndarray:
    """e_k that brings each component's largest fp16 coefficient just below fp16's range, (K,) integers."""
    exact = natural_parameters(mixture, frame, lambda values: values)
    largest = np.abs(exact.linear).max(axis=1)
    if mixture.covariance_type == "diag" or mixture.n_features == 1:
        largest = np.maximum(largest, np.abs(exact.quadratic).max(axis=1))
    _, exponents = np.frexp(np.where(largest > 0, largest * _LOG2E, 1.0))
    # 2^e itself must stay a normal fp32 number.
    return np.asarray(np.clip(exponents.astype(np.int64) - _TOP_EXPONENT, -120, 120))


def _padded(values: Float64Array, shape: tuple[int, ...], fill: float = 0.0) -> Float64Array:
    whole = np.full(shape, fill)
    whole[tuple(slice(0, n) for n in values.shape)] = values
    return whole
