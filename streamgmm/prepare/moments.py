"""Mean and scatter of rows that pass by once, in fp64, about their own mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from streamgmm.parallel import one_blas_thread
from streamgmm.transforms import Float64Array, Linear, RowMap, Scale


@dataclass(frozen=True, eq=False)
class Moments:
    """Of some rows, about their own mean, so that nothing cancels however far from zero they lie.

    Attributes
    ----------
    counts : (D,) float64 array
        Finite values in each column.
    mean : (D,) float64 array
        Of those; zero where there are none.
    scatter : (D,) or (D, D) float64 array
        Σ (x − mean)², or Σ (x − mean)(x − mean)ᵀ of rows that are finite throughout.
    largest : float
        Largest |x|.
    """

    counts: Float64Array
    mean: Float64Array
    scatter: Float64Array
    largest: float

    @classmethod
    def none(cls, n_features: int, *, full: bool) -> Moments:
        """Of no rows."""
        shape = (n_features, n_features) if full else (n_features,)
        return cls(np.zeros(n_features), np.zeros(n_features), np.zeros(shape), 0.0)

    @classmethod
    def of(cls, rows: Float64Array, *, full: bool) -> Moments:
        """Of ``rows`` (n, D); a diagonal scatter leaves out what is not finite, a full one does not allow it."""
        finite = np.isfinite(rows)
        if not len(rows):
            return cls.none(rows.shape[1], full=full)
        if finite.all():
            mean = rows.mean(axis=0)
            centred = rows - mean
            counts = np.full(rows.shape[1], float(len(rows)))
            with one_blas_thread:
                scatter = centred.T @ centred if full else np.einsum("nd,nd->d", centred, centred)
            return cls(counts, mean, scatter, float(np.abs(rows).max()))
        assert not full
        counts = finite.sum(axis=0).astype(np.float64)
        known = np.where(finite, rows, 0.0)
        mean = known.sum(axis=0) / np.maximum(counts, 1.0)
        centred = np.where(finite, rows - mean, 0.0)
        return cls(counts, mean, np.einsum("nd,nd->d", centred, centred), float(np.abs(known).max()))

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of rows (Chan, Golub & LeVeque 1979)."""
        counts = self.counts + other.counts
        share = other.counts / np.maximum(counts, 1.0)
        delta = other.mean - self.mean
        # A full scatter has the same count in every column.
        weight = self.counts * share
        between = delta * weight * delta if self.scatter.ndim == 1 else np.outer(delta * weight, delta)
        return Moments(
            counts,
            self.mean + delta * share,
            self.scatter + other.scatter + between,
            max(self.largest, other.largest),
        )

    def through(self, each: RowMap) -> Moments:
        """Of the same rows after ``each``, a `Scale` or a `Linear`; their largest value is then unknown (NaN).

        A `Linear` needs a full scatter, and counts equal in all columns.
        """
        unknown = float("nan")
        if isinstance(each, Scale):
            factor = np.outer(each.scale, each.scale) if self.scatter.ndim == 2 else each.scale**2
            mean = (self.mean - each.centre) / each.scale
            return Moments(self.counts, mean, self.scatter / factor, unknown)
        assert isinstance(each, Linear)
        mean = (self.mean - each.centre) @ each.matrix
        scatter = each.matrix.T @ self.scatter @ each.matrix
        return Moments(np.full(len(mean), self.counts[0]), mean, scatter, unknown)

    @property
    def variance(self) -> Float64Array:
        """Of each column, about its mean, over n."""
        diagonal = np.diagonal(self.scatter) if self.scatter.ndim == 2 else self.scatter
        return np.asarray(diagonal / np.maximum(self.counts, 1.0))

    def tensors(self) -> dict[str, np.ndarray]:
        """For storage."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Moments:
        """The inverse of `tensors`."""
        largest = float(tensors["largest"])
        return cls(tensors["counts"], tensors["mean"], tensors["scatter"], largest)
