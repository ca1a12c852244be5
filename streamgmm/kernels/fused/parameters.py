"""Mixtures in the forms that the Triton kernels multiply by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem
from streamgmm.kernels.fused.configs import COMPONENT_PADDING, COMPONENT_TILE, stride_of
from streamgmm.kernels.fused.split_parameters import SplitCoefficients, split_coefficients
from streamgmm.kernels.fused.whitening import HalfFactor, Whitening, factor_of, half_factor, whitening_of
from streamgmm.kernels.natural import exact_parameters, natural_parameters
from streamgmm.kernels.tiled import TiledKernel, TiledParameters
from streamgmm.mixture import Float64Array, Mixture

Origins: TypeAlias = dict[torch.dtype, tuple[Tensor, Tensor]]

_LOG2E = 1.4426950408889634
# The largest coefficient of a component lies in [2¹⁴, 2¹⁵) where it has an exponent of its own: fp16 then keeps full
# precision 2²⁸ below it. Without one it may lie from 2⁻⁶ on, and still has its 11 bits for coefficients 2⁸ smaller.
_TOP_EXPONENT = 15
_LOWEST_EXPONENT = -6


@dataclass(frozen=True, eq=False)
class Coefficients:
    """θ and α in bits for fp16 rows, padded to whole tiles; padding has α = −inf and zeros elsewhere.

    Attributes
    ----------
    linear : (K', D') fp16 tensor
        2^{−e_k} log₂e · θ.
    quadratic : tensor
        ``diag`` (K', D') as ``linear``; ``spherical`` (K',) fp32, 2^{−e_k} log₂e · (−p/2); ``tied`` unused.
    exponents : (K',) fp32 tensor
        2^{e_k}.
    constants : (K',) fp32 tensor
        2^{−e_k} log₂e · α_k.
    scaled : bool
        Whether some e_k is not 0.
    """

    linear: Tensor
    quadratic: Tensor
    exponents: Tensor
    constants: Tensor
    scaled: bool

    @cached_property
    def terms(self) -> Tensor:
        """Of each COMPONENT_PADDING components constants and then quadratic terms, (2K',) fp32; not of ``diag``."""
        pairs = [values.view(-1, COMPONENT_PADDING) for values in (self.constants, self.quadratic)]
        return torch.cat(pairs, dim=1).flatten()


@dataclass(frozen=True, eq=False)
class FusedParameters:
    """A mixture and its frame on a device, in each form that a pass turns out to need; ``precision`` is its first."""

    mixture: Mixture
    frame: Frame
    device: torch.device
    precision: str
    architecture: str
    hard: bool

    @cached_property
    def problem(self) -> Problem:
        m = self.mixture
        return Problem(m.n_components, m.n_features, m.covariance_type)

    @property
    def is_diag(self) -> bool:
        return self.mixture.covariance_type == "diag"

    @property
    def is_tied(self) -> bool:
        return self.mixture.covariance_type == "tied"

    @property
    def uses_norms(self) -> bool:
        """Whether logits and scatter need ‖x'‖²."""
        return self.mixture.covariance_type == "spherical"

    @cached_property
    def half(self) -> Coefficients:
        """For fp16 rows."""
        return _coefficients(self.mixture, self.frame, self.places, self.device, self.whitening)

    @cached_property
    def split(self) -> SplitCoefficients:
        """For rows split into planes."""
        return split_coefficients(self.mixture, self.frame, self.places, self.device, self.whitening)

    @cached_property
    def widest(self) -> TiledKernel:
        """What takes the granules that no other form resolves."""
        return TiledKernel(torch.float64, hard=self.hard)

    @cached_property
    def double(self) -> TiledParameters:
        """For `widest`."""
        return self.widest.parameters(self.mixture, self.frame, self.device)

    @cached_property
    def half_factor(self) -> HalfFactor:
        """U of ``tied`` for fp16 rows."""
        return half_factor(factor_of(self.mixture, self.frame), self.device)

    @cached_property
    def whitening(self) -> Whitening | None:
        """Of ``tied``: the coordinates of all forms of a pass."""
        if not self.is_tied:
            return None
        exact = self.precision != "medium"
        factor = factor_of(self.mixture, self.frame) if exact else self.half_factor.values
        return whitening_of(self.mixture, self.frame, factor)

    @cached_property
    def places(self) -> np.ndarray:
        """The component in each place, (K,): neighbours share a tile, which is skipped where none of them matters."""
        if self.hard:  # one tile matters to each row, whatever the order
            return np.arange(self.mixture.n_components)
        if self.whitening is not None:  # distances that responsibilities depend on
            return neighbours(self.whitening.means, COMPONENT_TILE)
        return neighbours((self.mixture.means - self.frame.shift) * self.frame.scale, COMPONENT_TILE)

    @cached_property
    def order(self) -> Tensor:
        """`places` on the device, (K',) int32; padding goes on counting."""
        places = np.arange(_padded_components(self.problem), dtype=np.int32)
        places[: len(self.places)] = self.places
        return torch.as_tensor(places, device=self.device)

    @cached_property
    def origins(self) -> Origins:
        """As `origins_of`."""
        return origins_of(self.frame, stride_of(self.mixture.n_features), self.device)


def origins_of(frame: Frame, stride: int, device: torch.device) -> Origins:
    """Shift and scale, padded to (``stride``,), in the types that rows are centred in."""
    shift, scale = (torch.as_tensor(_padded(values, (stride,)), device=device) for values in (frame.shift, frame.scale))
    return {dtype: (shift.to(dtype), scale.to(dtype)) for dtype in (torch.float32, torch.float64)}


def neighbours(points: Float64Array, tile: int) -> np.ndarray:
    """An order of ``points`` (K, D) in which each run of ``tile`` lies together: halves along the widest direction."""

    def halves(members: np.ndarray) -> list[np.ndarray]:
        if len(members) <= tile:
            return [members]
        own = narrow[members]
        own -= own.mean(axis=0)
        direction = np.zeros(points.shape[1], np.float32)
        direction[np.argmax((own**2).sum(axis=0))] = 1.0
        for _ in range(_POWER_STEPS):
            direction = own.T @ (own @ direction)
            length = np.sqrt(direction @ direction)
            if not 0 < length < np.inf:
                return [members]
            direction /= length
        ranked = members[np.argsort(own @ direction, kind="stable")]
        middle = -(-len(members) // (2 * tile)) * tile
        return halves(ranked[:middle]) + halves(ranked[middle:])

    with np.errstate(over="ignore", invalid="ignore"):
        narrow = points.astype(np.float32)  # any order is right, and this is twice as fast
        return np.concatenate(halves(np.arange(len(points))))


_POWER_STEPS = 6


def _padded_components(problem: Problem) -> int:
    return -(-problem.n_components // COMPONENT_PADDING) * COMPONENT_PADDING


def _coefficients(
    mixture: Mixture,
    frame: Frame,
    places: np.ndarray,
    device: torch.device,
    whitening: Whitening | None,
) -> Coefficients:
    diag = mixture.covariance_type == "diag"
    exact = exact_parameters(mixture, frame) if whitening is None else None
    if exact is None:
        assert whitening is not None
        largest = np.abs(whitening.means).max(axis=1)
    else:
        largest = np.abs(exact.linear).max(axis=1)
        if diag or mixture.n_features == 1:
            largest = np.maximum(largest, np.abs(exact.quadratic).max(axis=1))
    exponents = _exponents(largest)
    any_scaled = bool(exponents.any())

    def in_bits(values: Float64Array) -> Float64Array:
        return np.asarray(values * _LOG2E)

    def scaled(values: Float64Array) -> Float64Array:
        if not any_scaled:
            return in_bits(values)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.ldexp(in_bits(values), -exponents.reshape(-1, *[1] * (values.ndim - 1))))

    def rounding(values: Float64Array) -> Float64Array:
        # The kernel multiplies a spherical precision, one number a component, by the norm in fp32.
        if not diag and values.shape[1] < mixture.n_features:
            return in_bits(values).astype(np.float32).astype(np.float64) / _LOG2E
        rounded = scaled(values).astype(np.float16).astype(np.float64)
        return np.asarray((np.ldexp(rounded, exponents[:, None]) if any_scaled else rounded) / _LOG2E)

    if exact is not None:
        natural = natural_parameters(mixture, frame, rounding, exact)
        linear, quadratic, constants = natural.linear, natural.quadratic, natural.constants
        # A precision that rounds to zero would silently empty its component; NaN surfaces in the likelihood instead.
        constants = np.where((quadratic == 0).any(axis=1), np.nan, constants)
    else:
        assert whitening is not None
        linear, constants = whitening.natural(mixture, rounding)
        quadratic = np.zeros((mixture.n_components, 1))

    n_padded = _padded_components(Problem(mixture.n_components, mixture.n_features, mixture.covariance_type))
    stride = stride_of(mixture.n_features)

    def on_device(values: Float64Array, shape: tuple[int, ...], kind: torch.dtype, fill: float = 0.0) -> Tensor:
        # The narrower type crosses: the host waits for what it copies from pageable memory.
        return torch.from_numpy(_padded(values[places], shape, fill)).to(kind).to(device)

    if diag:
        on_device_quadratic = on_device(scaled(quadratic), (n_padded, stride), torch.float16)
    else:
        on_device_quadratic = on_device(scaled(quadratic[:, 0]), (n_padded,), torch.float32)
    return Coefficients(
        linear=on_device(scaled(linear), (n_padded, stride), torch.float16),
        quadratic=on_device_quadratic,
        exponents=on_device(np.ldexp(1.0, exponents), (n_padded,), torch.float32, 1.0),
        constants=on_device(scaled(constants), (n_padded,), torch.float32, -np.inf),
        scaled=any_scaled,
    )


def _exponents(largest: Float64Array) -> np.ndarray:
    """e_k that keeps each component's coefficients, by the ``largest`` of them, within fp16's range, (K,) int32.

    All zero where that does. NumPy's ``ldexp`` takes fourteen times as long with int64.
    """
    _, exponents = np.frexp(np.where(largest > 0, largest * _LOG2E, 1.0))
    if ((exponents > _LOWEST_EXPONENT) & (exponents <= _TOP_EXPONENT)).all():
        return np.zeros_like(exponents)
    # 2^e itself must stay a normal fp32 number.
    return np.asarray(np.clip(exponents - _TOP_EXPONENT, -120, 120))


def _padded(values: Float64Array, shape: tuple[int, ...], fill: float = 0.0) -> Float64Array:
    whole = np.full(shape, fill)
    whole[tuple(slice(0, n) for n in values.shape)] = values
    return whole
