"""How likely a list is to hold a neighbour that the lists before it do not: what a search should be led by.

A fixed number of lists gives an easy query as many as a hard one. The odds here are a logistic function of a list's
place and of geometry that is known before any vector is compared; they are learnt from queries whose neighbours are
known. What a distance margin or a posterior says differs from one collection to the next; these odds are fitted to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.ann.quantizer import Float32Array
from streamgmm.errors import DamagedFileError
from streamgmm.mixture import Float64Array
from streamgmm.storage import load_tensors, save_tensors

_RIDGE = 1e-3
_NEWTON_STEPS = 50
_HALVINGS = 20
_CONVERGED = 1e-9
_CLIP = 4.0
"""Standard deviations beyond which a feature says nothing new."""

_QUERIES = 64
_TINY = 1e-9
_NAMES = ("centroids", "sizes", "radii", "mean", "scale", "coefficients")


@dataclass(frozen=True, eq=False)
class HitModel:
    """Odds that a list holds a query's neighbour and no list before it does.

    Attributes
    ----------
    centroids : (K, D) float32 array
    sizes : (K,) array
        Vectors in each list.
    radii : (K,) array
        Mean squared distance of the vectors nearest to each centroid to it.
    mean, scale : (F,) arrays
        By which features are standardised.
    coefficients : (1 + F + F + F − 1,) array
        Of 1, the features, their squares, and their products with the first.
    """

    centroids: Float32Array
    sizes: Float64Array
    radii: Float64Array
    mean: Float64Array
    scale: Float64Array
    coefficients: Float64Array

    def log_odds(self, lists: Tensor, distances: Tensor) -> Tensor:
        """Of each query's lists (Q, P), given with ‖q − c‖² in the order in which they are looked into; fp32."""
        shape, coefficients = self._shape, torch.from_numpy(self.coefficients).float()
        parts = [
            _expanded(shape.features(own, near), self.mean, self.scale) @ coefficients
            for own, near in zip(lists.cpu().split(_QUERIES), distances.cpu().split(_QUERIES), strict=True)
        ]
        return torch.cat(parts).to(lists.device)

    @cached_property
    def _shape(self) -> _Shape:
        return _Shape(self.centroids, self.sizes, self.radii)

    def save(self, path: str | Path) -> None:
        """Write a checksummed safetensors file."""
        save_tensors(Path(path), {name: getattr(self, name) for name in _NAMES}, {"format": "streamgmm-hits"})

    @classmethod
    def load(cls, path: str | Path) -> HitModel:
        """What `save` wrote. Raises DataError or DamagedFileError."""
        tensors, metadata = load_tensors(Path(path))
        if metadata.get("format") != "streamgmm-hits" or set(tensors) != set(_NAMES):
            raise DamagedFileError(f"{path}: holds {metadata.get('format')!r}, no hit model; give one that was saved")
        return cls(**tensors)


def learn_hits(
    lists: Tensor,
    distances: Tensor,
    found: Tensor,
    centroids: Float32Array,
    sizes: NDArray[np.int64],
    radii: Float64Array,
) -> HitModel:
    """A model from queries whose neighbours are known, by penalised maximum likelihood (Newton's method).

    Parameters
    ----------
    lists, distances : (Q, P) tensors
        In the order in which they are looked into.
    found : (Q, P) tensor
        Share of a query's neighbours in its first 1, 2, … lists.
    sizes, radii : (K,) arrays
        See `HitModel`.
    """
    shape = _Shape(centroids, sizes.astype(np.float64), radii)
    features = torch.cat(
        [
            shape.features(own, near)
            for own, near in zip(lists.cpu().split(_QUERIES), distances.cpu().split(_QUERIES), strict=True)
        ]
    ).flatten(0, 1)
    hits = torch.diff(found.cpu().double(), dim=1, prepend=torch.zeros(len(found), 1, dtype=torch.float64)).flatten()
    exact = features.double()
    mean, scale = exact.mean(0).numpy(), exact.std(0, correction=0).clamp(min=_TINY).numpy()
    coefficients = _logistic(_expanded(features, mean, scale).double(), hits).numpy()
    return HitModel(centroids, sizes.astype(np.float64), radii, mean, scale, coefficients)


def _logistic(design: Tensor, share: Tensor) -> Tensor:
    """Coefficients of a logistic regression on shares in [0, 1] with a small ridge: Newton steps, halved if need be."""
    rate = float(share.mean().clamp(1e-6, 1 - 1e-6))
    ridge = torch.full((design.shape[1],), _RIDGE * rate, dtype=torch.float64)

    def objective(coefficients: Tensor) -> float:
        logits = design @ coefficients
        likelihood = (share * logits - torch.nn.functional.softplus(logits)).mean()
        return float(likelihood - 0.5 * (ridge * coefficients**2).sum())

    coefficients = torch.zeros_like(ridge)
    coefficients[0] = np.log(rate / (1 - rate))
    reached = objective(coefficients)
    for _ in range(_NEWTON_STEPS):
        fitted = torch.sigmoid(design @ coefficients)
        curvature = design.T @ (design * (fitted * (1 - fitted))[:, None]) / len(design) + ridge.diag()
        slope = design.T @ (share - fitted) / len(design) - ridge * coefficients
        step = torch.linalg.solve(curvature, slope)
        length = next((2.0**-i for i in range(_HALVINGS) if objective(coefficients + 2.0**-i * step) > reached), None)
        if length is None:
            break
        coefficients = coefficients + length * step
        before, reached = reached, objective(coefficients)
        if reached - before < _CONVERGED:
            break
    return coefficients


def _expanded(features: Tensor, mean: Float64Array, scale: Float64Array) -> Tensor:
    z = ((features - torch.from_numpy(mean).float()) / torch.from_numpy(scale).float()).clamp(-_CLIP, _CLIP)
    return torch.cat([torch.ones_like(z[..., :1]), z, z**2, z[..., :1] * z[..., 1:]], -1)


class _Shape:
    """What is known of the lists before any vector is compared."""

    def __init__(self, centroids: Float32Array, sizes: Float64Array, radii: Float64Array) -> None:
        self._centroids = torch.from_numpy(np.ascontiguousarray(centroids))
        self._sizes = torch.from_numpy(sizes).float()
        self._radii = torch.from_numpy(radii).float()

    def features(self, lists: Tensor, distances: Tensor) -> Tensor:
        """(Q, P, F) fp32, all logarithms: the list's place; the distance to the plane between its centroid and the
        nearest one, as it is, over the distance to the nearest centroid, and over the list's radius; that nearest
        distance; the margin in ‖q − c‖²; the list's radius; its size.
        """
        near = distances.float()
        place = torch.arange(1, lists.shape[1] + 1, dtype=torch.float32).expand_as(near)
        first = self._centroids[lists[:, :1]]
        apart = (self._centroids[lists] - first).norm(dim=2)
        margin = (near - near[:, :1]).clamp(min=0)
        unit = float(self._radii.mean()) or 1.0
        plane = margin / (2 * apart).clamp(min=_TINY * unit**0.5)
        nearest = near[:, :1].clamp(min=_TINY * unit).sqrt().expand_as(near)
        radius = self._radii[lists].clamp(min=_TINY * unit)
        parts = [
            place,
            plane + _TINY * unit**0.5,
            plane / nearest + _TINY,
            nearest,
            margin + _TINY * unit,
            radius,
            self._sizes[lists] + 1,
            plane / radius.sqrt() + _TINY,
        ]
        return torch.stack(parts, 2).log()
