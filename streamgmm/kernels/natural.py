r"""Mixtures in natural parameters, shared by every fast kernel.

In the frame's coordinates each component's log joint density is linear in a few features of a row,

    log w_k p_k(x) = α_k + φ(x)·θ_k  (+ a term common to all k),

and the statistics are Σ r_k φ(x): one matrix product each way. With P the precision and μ the mean,

=========  ==========================  ============================  ==================
type       φ(x)                        θ                             common term
=========  ==========================  ============================  ==================
spherical  x, ‖x‖²                     pμ, −p/2                      0
diag       x, x²                       Pμ, −diag(P)/2                0
tied       x                           Pμ                            −½ xᵀPx
full       x, x_i x_j (i ≤ j)          Pμ, −P_ii/2 or −P_ij          0
=========  ==========================  ============================  ==================

Source: Wainwright & Jordan, Graphical models, exponential families, and variational inference (2008), §3.

α_k is derived in fp64 from θ_k as rounded to the type that the product multiplies by, so that a kernel is exact for
the model it evaluates (two roundings of one precision would not cancel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from streamgmm.frame import Frame
from streamgmm.mixture import Float64Array, Mixture

Rounding = Callable[[Float64Array], Float64Array]


@dataclass(frozen=True, eq=False)
class NaturalParameters:
    """fp64 arrays whose ``linear`` and ``quadratic`` are already rounded to the working type.

    Attributes
    ----------
    constants : (K,) array
        α, in nats, log-density in the data's units; −inf for a component of weight zero.
    linear : (K, D) array
    quadratic : array
        ``spherical`` (K, 1), ``diag`` (K, D), ``full`` (K, D(D+1)/2), ``tied`` (0, 0).
    common : (D, D) array or None
        P of ``tied``, for −½ xᵀPx.
    """

    constants: Float64Array
    linear: Float64Array
    quadratic: Float64Array
    common: Float64Array | None


@dataclass(frozen=True, eq=False)
class ExactParameters:
    """θ before it is rounded: ``linear`` (K, D), ``quadratic`` as in `NaturalParameters`, but P of tied and full."""

    linear: Float64Array
    quadratic: Float64Array


def exact_parameters(mixture: Mixture, frame: Frame) -> ExactParameters:
    """``mixture`` in ``frame``."""
    means = (mixture.means - frame.shift) * frame.scale
    # An overflow here is the narrow type's range: it surfaces as a non-finite likelihood, which moves precision on.
    with np.errstate(over="ignore", invalid="ignore"):
        if mixture.covariance_type in ("tied", "full"):
            precisions = mixture.precisions / np.outer(frame.scale, frame.scale)
            return ExactParameters(np.einsum("...ij,...j->...i", precisions, means), precisions)
        covariances = mixture.covariances.reshape(mixture.n_components, -1)
        scale = frame.scale[:1] if mixture.covariance_type == "spherical" else frame.scale
        precisions = 1.0 / (covariances * scale**2)
        return ExactParameters(precisions * means, -0.5 * precisions)


def natural_parameters(
    mixture: Mixture, frame: Frame, rounding: Rounding, exact: ExactParameters | None = None
) -> NaturalParameters:
    """``mixture`` in ``frame``, with parameters rounded by ``rounding`` (fp64 in, fp64 out); ``exact`` where known."""
    exact = exact or exact_parameters(mixture, frame)
    shape = _matrix if mixture.covariance_type in ("tied", "full") else _diagonal
    with np.errstate(divide="ignore"):
        log_weights = np.log(mixture.weights)
    with np.errstate(over="ignore", invalid="ignore"):
        linear, quadratic, common, log_normaliser = shape(mixture, rounding(exact.linear), rounding(exact.quadratic))
    constants = log_weights + log_normaliser + frame.log_volume - 0.5 * mixture.n_features * np.log(2 * np.pi)
    return NaturalParameters(constants, linear, quadratic, common)


_Parts = tuple[Float64Array, Float64Array, Float64Array | None, Float64Array]


def _diagonal(mixture: Mixture, linear: Float64Array, quadratic: Float64Array) -> _Parts:
    precisions = -2.0 * quadratic
    with np.errstate(divide="ignore"):
        log_det = np.log(precisions).sum(axis=1) * (mixture.n_features / precisions.shape[1])
        energy = (linear**2 / precisions).sum(axis=1)
    return linear, quadratic, None, 0.5 * (log_det - energy)


def _matrix(mixture: Mixture, linear: Float64Array, precisions: Float64Array) -> _Parts:
    energy = np.einsum("ki,ki->k", linear, _solve(precisions, linear))
    log_normaliser = 0.5 * (np.linalg.slogdet(precisions)[1] - energy)
    if mixture.covariance_type == "tied":
        return linear, np.empty((0, 0)), precisions, log_normaliser
    i, j = np.triu_indices(mixture.n_features)
    return linear, -np.where(i == j, 0.5, 1.0) * precisions[:, i, j], None, log_normaliser


def _solve(matrices: Float64Array, vectors: Float64Array) -> Float64Array:
    """Matrices (D, D) or (K, D, D) against vectors (K, D); a singular rounding gives NaN, which moves precision on."""
    try:
        if matrices.ndim == 2:
            return np.asarray(np.linalg.solve(matrices, vectors.T).T, dtype=np.float64)
        return np.asarray(np.linalg.solve(matrices, vectors[:, :, None])[:, :, 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        return np.full_like(vectors, np.nan)
