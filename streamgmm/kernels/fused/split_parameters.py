r"""Mixtures as fp16 planes for the split products of ``high``: `split` has the equations.

A number in units 2^{−u} is written as an integer plus fractions, each an fp16 number: v·2^u = d₁ + d₂ (+ d₃), with
d₁ = ⌊v·2^u⌉ and |d₂| ≤ ½ as a rule. Rows take three planes; parameters are *defined* by their first two, about 22 bits,
and α_k is derived in fp64 from what these say, so that the E-step is exact for that model (two roundings of one
precision would not cancel).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels.fused.configs import COMPONENT_PADDING, stride_of
from streamgmm.kernels.fused.whitening import Whitening
from streamgmm.mixture import Float64Array, Mixture

_LOG2E = 1.4426950408889634
_WIDEST_SLICE = 128
# Products of leading planes are integers, exact in fp32 below 2²⁴.
_EXACT_BITS = 24
# Rows and means of twice the usual energy still leave them exact; farther ones lose a bit at a time.
_HEADROOM_BITS = 1
# Finer products would gain nothing over the fp32 sum of the smaller terms.
_FINEST = 16
# Parameters have a plane less than rows, and so some places more.
_FEWER_ROW_PLACES = 2
_FP16_BITS = 15
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Units:
    """Binary places of the leading planes: x' in 2^{−rows}, x'² in 2^{−squares}, x'·μ' in 2^{−products}."""

    rows: int
    squares: int
    products: int

    def largest_row(self, diag: bool) -> float:
        """|x'| beyond which a plane would overflow fp16."""
        exponent = (_FP16_BITS - self.squares) / 2 if diag else float(_FP16_BITS - self.rows)
        return float(2.0**exponent)


@dataclass(frozen=True, eq=False)
class SplitCoefficients:
    """θ and α by place, padded to whole tiles; padding has α = −inf and zeros elsewhere. S slices of features.

    Attributes
    ----------
    units : Units
    offset : float
        Bits that every log-sum-exp lacks, a whole number that brings the likeliest rows near zero, where fp32 is fine.
    linear : (2, K', D') fp16 tensor
        Planes of μ' (``spherical``) or of 2^{−e_k} log₂e · Pμ' (``diag``).
    quadratic : tensor
        ``diag`` (2, K', D') fp16, planes of 2^{−e_k} log₂e · (−P/2); ``spherical`` (1,), unused. ``tied`` is spherical.
    energies : (2, S, K') fp32 tensor
        Whole and fractional part of the slice's form at x' = 0, in 2^{−products}: −½‖μ'‖², or e_k's own −½μ'ᵀPμ'.
    factors : (K',) fp32 tensor
        Bits in one unit of the form: log₂e · p_k 2^{−products}, or 2^{e_k−products}.
    constants : (K',) fp32 tensor
        log₂ of weight and normaliser, in the data's units, less ``offset``.
    centres : (K', D') fp16 tensor
        c: μ' to the nearest whole number of 2^{−rows}. Sums are accumulated about it, and scatter of ``diag``.
    """

    units: Units
    offset: float
    linear: Tensor
    quadratic: Tensor
    energies: Tensor
    factors: Tensor
    constants: Tensor
    centres: Tensor

    def centres_at(self, places: Tensor, n_features: int) -> Centres:
        """Centres of the components in ``places`` (k,), and their first ``n_features``."""
        centres = self.centres[places, :n_features].double() * 2.0**-self.units.rows
        if self.quadratic.ndim > 1:
            return Centres(centres, centres)
        means = self.linear[:, places, :n_features].double().sum(dim=0)
        return Centres(centres, means * 2.0 ** (self.units.rows - self.units.products))


@dataclass(frozen=True, eq=False)
class Centres:
    """What statistics are about, in the frame's coordinates: ``sums`` and ``scatter`` (K, D) fp64.

    Both are c for ``diag``; the scatter of ``spherical`` is about μ' as its planes say it. Statistics are fp64 too:
    ``counts`` (K,), ``sums`` (K, D), ``scatter`` as ``sums`` or, for ``spherical``, as ``counts``. What the M-step sees
    keeps its accuracy on the way to the origin: it takes the same products off again.
    """

    sums: Tensor
    scatter: Tensor

    def sums_about_origin(self, counts: Tensor, sums: Tensor) -> Tensor:
        """Sums about the frame's origin from those about the centres."""
        return sums + counts[:, None] * self.sums

    def sums_about_centres(self, counts: Tensor, sums: Tensor) -> Tensor:
        """The inverse."""
        return sums - counts[:, None] * self.sums

    def scatter_about_origin(self, counts: Tensor, sums: Tensor, scatter: Tensor) -> Tensor:
        """Scatter about the frame's origin from that about the centres; ``sums`` are about the origin."""
        return scatter + self._energy(counts, sums, scatter)

    def scatter_about_centres(self, counts: Tensor, sums: Tensor, scatter: Tensor) -> Tensor:
        """The inverse; ``sums`` are about the origin here too."""
        return scatter - self._energy(counts, sums, scatter)

    def _energy(self, counts: Tensor, sums: Tensor, scatter: Tensor) -> Tensor:
        """Σ r (x'² − (x'−c)²)."""
        energy = self.scatter * (2 * sums - counts[:, None] * self.scatter)
        return energy if scatter.ndim == sums.ndim else energy.sum(dim=1)


def slice_of(n_features: int) -> int:
    """Features whose products are summed before they meet anything else."""
    return min(stride_of(n_features), _WIDEST_SLICE)


def split_coefficients(
    mixture: Mixture, frame: Frame, places: np.ndarray, device: torch.device, whitening: Whitening | None = None
) -> SplitCoefficients:
    """A ``spherical`` or ``diag`` mixture in ``frame``, or a ``tied`` one as a spherical one of y; by ``places``."""
    diag = mixture.covariance_type == "diag"
    if whitening is None:
        means = (mixture.means - frame.shift) * frame.scale
        scale = frame.scale if diag else frame.scale[:1]
        variances = mixture.covariances.reshape(mixture.n_components, -1) * scale**2
        log_volume = frame.log_volume
    else:
        means, variances = whitening.means, np.ones((mixture.n_components, 1))
        log_volume = whitening.log_volume
    units = _units(mixture.weights, means, variances)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        parts = (_diag if diag else _spherical)(means, 1.0 / variances, units)
        log_det = np.log(parts.precisions).sum(axis=1) * (mixture.n_features / parts.precisions.shape[1])
        log_weights = np.log(mixture.weights)
    normaliser = 0.5 * log_det + log_volume - 0.5 * mixture.n_features * np.log(2 * np.pi)
    constants = (log_weights + normaliser) * _LOG2E
    offset = _offset(constants, mixture.n_features)

    n_padded = -(-mixture.n_components // COMPONENT_PADDING) * COMPONENT_PADDING
    stride, width = stride_of(mixture.n_features), slice_of(mixture.n_features)

    def on_device(values: Float64Array, shape: tuple[int, ...], kind: torch.dtype, fill: float = 0.0) -> Tensor:
        whole = np.full(shape, fill)
        whole[tuple(slice(0, n) for n in values.shape)] = values
        return torch.as_tensor(whole, device=device).to(kind)

    edges = np.arange(0, mixture.n_features, width)
    energies = whole_and_rest(np.add.reduceat(parts.energies, edges, axis=1).T)
    planes = (2, n_padded, stride)
    quadratic = parts.quadratic[:, places] if diag else parts.quadratic
    centres = np.clip(np.rint(np.ldexp(means, units.rows)), -_FP16_MAX, _FP16_MAX)
    return SplitCoefficients(
        units=units,
        offset=offset,
        linear=on_device(parts.linear[:, places], planes, torch.float16),
        quadratic=on_device(quadratic, planes if diag else (1,), torch.float16),
        energies=on_device(energies[:, :, places], (2, stride // width, n_padded), torch.float32),
        factors=on_device(parts.factors[places], (n_padded,), torch.float32),
        constants=on_device((constants - offset)[places], (n_padded,), torch.float32, -np.inf),
        centres=on_device(centres[places], planes[1:], torch.float16),
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """What differs between the types, unpadded: ``precisions`` are those that the planes say."""

    linear: Float64Array
    quadratic: Float64Array
    energies: Float64Array
    factors: Float64Array
    precisions: Float64Array


def _spherical(means: Float64Array, precisions: Float64Array, units: Units) -> _Parts:
    planes = leading_planes(np.ldexp(means, units.products - units.rows))
    centres = np.ldexp(planes.sum(axis=0), units.rows - units.products)
    factors = np.ldexp(precisions[:, 0] * _LOG2E, -units.products).astype(np.float32).astype(np.float64)
    return _Parts(
        linear=planes,
        quadratic=np.zeros(1),
        energies=np.ldexp(-0.5 * centres**2, units.products),
        factors=factors,
        precisions=np.ldexp(factors[:, None] / _LOG2E, units.products),
    )


def _diag(means: Float64Array, precisions: Float64Array, units: Units) -> _Parts:
    linear_bits, square_bits = units.products - units.rows, units.products - units.squares
    half = 0.5 * _LOG2E * precisions
    # e_k keeps the form's leading planes within their bits, and those of θ within fp16's range.
    largest = np.maximum(half.max(axis=1), np.abs(2 * half * means).max(axis=1) * 2.0 ** (linear_bits - _FP16_BITS))
    exponents = np.frexp(largest)[1].astype(np.int64)[:, None]
    quadratic = leading_planes(np.ldexp(-half, square_bits - exponents))
    own_half = -np.ldexp(quadratic.sum(axis=0), -square_bits)
    linear = leading_planes(np.ldexp(2 * own_half * means, linear_bits))
    theta = np.ldexp(linear.sum(axis=0), -linear_bits)
    centres = theta / (2 * own_half)
    return _Parts(
        linear=linear,
        quadratic=quadratic,
        energies=np.ldexp(-0.5 * theta * centres, units.products),
        factors=np.ldexp(1.0, exponents[:, 0] - units.products),
        # A precision that rounds to zero would silently empty its component; NaN surfaces in the likelihood instead.
        precisions=np.where(own_half > 0, np.ldexp(2 * own_half / _LOG2E, exponents), np.nan),
    )


def _units(weights: Float64Array, means: Float64Array, variances: Float64Array) -> Units:
    """Units in which products of leading planes stay exact for rows that the mixture makes likely."""
    power = weights @ (means**2 + variances)
    edges = np.arange(0, means.shape[1], _WIDEST_SLICE)
    energy = max(float(np.add.reduceat(power, edges).max()), 1e-30)
    places = int(np.clip(_EXACT_BITS - _HEADROOM_BITS - np.ceil(np.log2(energy)), -60, _FINEST))
    rows = places // 2 - _FEWER_ROW_PLACES
    farthest = max(float(np.abs(means).max()), 1e-30)
    linear = min(places - rows, _FP16_BITS - int(np.frexp(farthest)[1]))
    return Units(rows=rows, squares=rows - 1, products=rows + linear)


def _offset(constants: Float64Array, n_features: int) -> float:
    finite = constants[np.isfinite(constants)]
    return float(np.rint(finite.max() - 0.5 * n_features * _LOG2E)) if finite.size else 0.0


def leading_planes(values: Float64Array) -> Float64Array:
    """(2, ...) numbers of fp16, in fp64, whose sum is nearly ``values``; what overflows is infinite."""
    first = np.rint(values).astype(np.float16).astype(np.float64)
    return np.stack([first, (values - first).astype(np.float16).astype(np.float64)])


def whole_and_rest(values: Float64Array) -> Float64Array:
    """(2, ...) numbers of fp32, in fp64: an integer, and what it lacks."""
    whole = np.rint(values).astype(np.float32).astype(np.float64)
    return np.stack([whole, values - whole])
