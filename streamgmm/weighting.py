"""How much each row counts: sample weights, rows held out, rows that are not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.errors import DataError, RequestError
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.vector import open_vector
from streamgmm.mixture import Float64Array


@dataclass(frozen=True, eq=False)
class Weighting:
    """The weight of every row in training; without any setting, each counts as one.

    Attributes
    ----------
    given : Source or None
        Sample weights, (N, 1).
    holdout : float
        Fraction of the rows left out of training, chosen by a hash of the row's number.
    seed : int
        Of that hash.
    skip_nonfinite : bool
        Rows with NaN or infinity count for nothing, instead of ending the run.
    scale : float
        Power of two by which weights are multiplied, so that a kernel sees them near one.
    """

    given: Source | None = None
    holdout: float = 0.0
    seed: int = 0
    skip_nonfinite: bool = False
    scale: float = 1.0

    def training(self, start: int, stop: int) -> Float64Array | None:
        """Weights of rows [start, stop) in training, (n,); None where each counts as one.

        Raises
        ------
        DataError
            A weight is negative or not finite.
        """
        weights = self._given(start, stop)
        if self.holdout == 0.0:
            return weights
        kept = ~self.held_out(np.arange(start, stop))
        return kept.astype(np.float64) if weights is None else weights * kept

    def held_out_weights(self, start: int, stop: int) -> Float64Array:
        """Weights of rows [start, stop) among the held-out ones, (n,); zero for the others. Raises as `training`."""
        weights = self._given(start, stop)
        held = self.held_out(np.arange(start, stop))
        return held.astype(np.float64) if weights is None else weights * held

    def held_out(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of the global ``rows`` is held out.

        A hash of the row's number, below the fraction.
        """
        if self.holdout == 0.0:
            return np.zeros(len(rows), dtype=bool)
        return _hashed(rows, (self.seed + 1) * 0x9E3779B97F4A7C15 % 2**64) * 2.0**-53 < self.holdout

    def of_rows(self, indices: NDArray[np.int64]) -> Float64Array | None:
        """`training` of the rows at sorted ``indices``."""
        kept = ~self.held_out(indices)
        if self.given is None:
            return None if kept.all() else kept.astype(np.float64)
        values = self.given.gather(indices)[0][:, 0].astype(np.float64)
        _check(self.given, values, indices)
        return np.asarray(values * self.scale * kept)

    def _given(self, start: int, stop: int) -> Float64Array | None:
        if self.given is None:
            return None
        values = self.given.read(start, stop)[:, 0].astype(np.float64)
        _check(self.given, values, np.arange(start, stop))
        return np.asarray(values * self.scale)


def uniform_of(rows: NDArray[np.int64], seed: list[int]) -> Float64Array:
    """A number between 0 and 1 for each row, from its global number and ``seed`` alone, (n,); neither end occurs."""
    offset = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return np.asarray((_hashed(rows, offset) + 0.5) * 2.0**-53)


def _hashed(rows: NDArray[np.int64], offset: int) -> Float64Array:
    """53 random bits a row: the finaliser of SplitMix64 (Steele, Lea & Flood 2014) of its number and ``offset``."""
    z = rows.astype(np.uint64) + np.uint64(offset)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(11)).astype(np.float64))


def open_weights(weights: Any, n_samples: int) -> Source:
    """Sample weights (N,) or (N, 1), an array or a file, as a source.

    Raises
    ------
    RequestError
        Not one weight a row.
    DataError
        Unreadable.
    """
    source = open_vector(weights)
    if source.shape != (n_samples, 1):
        n, d = source.shape
        shape = f"({n},)" if d == 1 else f"{source.shape}"
        raise RequestError(f"sample_weight must have one value a row, shape ({n_samples},); got {shape}")
    return source


def power_of_two_near(weights: Float64Array) -> float:
    """The power of two that brings the mean of the positive ``weights`` near one; 1 where there are none."""
    positive = weights[weights > 0]
    return float(np.exp2(-np.rint(np.log2(positive.mean())))) if len(positive) else 1.0


def without_nonfinite(
    rows: Tensor, weights: Float64Array | None, fill: Tensor
) -> tuple[Tensor, Float64Array | None, int]:
    """Rows (n, D) and weights with what is not finite replaced by ``fill`` (D,) and weightless, and how many rows.

    Rows that are all finite come back as they are.
    """
    if not rows.is_floating_point():
        return rows, weights, 0
    finite = torch.isfinite(rows).all(dim=1)
    host = finite.cpu().numpy()
    skipped = len(host) - int(host.sum())
    if not skipped:
        return rows, weights, 0
    rows = torch.where(finite[:, None], rows, fill.to(device=rows.device, dtype=rows.dtype))
    return rows, host.astype(np.float64) if weights is None else weights * host, skipped


def _check(source: Source, values: Float64Array, indices: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        where = source.locate(int(indices[bad[0]]))
        raise DataError(f"sample_weight: {where} is {values[bad[0]]}; weights must be finite and at least 0")
