"""The frame in which kernels see the data: x' = (x − s)·c."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from streamgmm.mixture import Float64Array
from streamgmm.statistics import Statistics

_LARGEST_EXPONENT = {"float64": 1000}
_LARGEST_EXPONENT_OF_OTHERS = 126  # they are scaled in float32


@dataclass(frozen=True, eq=False)
class Frame:
    """Shift and scale of the working coordinates.

    The shift is representable in float32 and the scales are powers of two, so that neither the subtraction of
    float32 data nor the way back adds a rounding of its own.

    Attributes
    ----------
    shift : (D,) fp64 array
    scale : (D,) fp64 array
        One value repeated for ``spherical``, whose distances a per-feature scale would change.
    """

    shift: Float64Array
    scale: Float64Array

    @classmethod
    def about(cls, mean: Float64Array, deviation: Float64Array, dtype: np.dtype[np.generic]) -> Frame:
        """The frame for rows of ``dtype`` near ``mean`` (D,) with ``deviation`` (D,); no deviation, no scaling."""
        with np.errstate(over="ignore"):
            narrow = mean.astype(np.float32).astype(np.float64)
        largest = _LARGEST_EXPONENT.get(dtype.name, _LARGEST_EXPONENT_OF_OTHERS)
        exponent = np.zeros_like(deviation)
        np.log2(deviation, out=exponent, where=deviation > 0)
        return cls(np.where(np.isfinite(narrow), narrow, mean), np.exp2(-np.clip(np.rint(exponent), -largest, largest)))

    @property
    def log_volume(self) -> float:
        """Σ log c: what a log-density in this frame lacks to be one in the data's units."""
        return float(np.log(self.scale).sum())

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Both arrays by name, for storage."""
        return {f"{prefix}shift": self.shift, f"{prefix}scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str = "") -> Frame:
        """The inverse of `tensors`."""
        return cls(tensors[f"{prefix}shift"], tensors[f"{prefix}scale"])

    def apply(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (n, D) of any stored type as x' of ``dtype``; float64 rows are centred before they are rounded."""
        wide = torch.float64 if torch.float64 in (rows.dtype, dtype) else torch.float32
        shift = torch.as_tensor(self.shift, dtype=wide, device=rows.device)
        scale = torch.as_tensor(self.scale, dtype=wide, device=rows.device)
        return rows.to(wide).sub(shift).mul_(scale).to(dtype)

    def restore(self, statistics: Statistics) -> Statistics:
        """Statistics of x' about the origin as statistics of x about the shift, in the data's units."""
        scale = torch.as_tensor(self.scale, device=statistics.sums.device)
        kind = statistics.covariance_type
        if kind == "full":
            i, j = torch.triu_indices(len(scale), len(scale), device=scale.device)
            square = scale[i] * scale[j]
        else:
            square = {"tied": torch.outer(scale, scale), "diag": scale**2, "spherical": scale[0] ** 2}[kind]
        return replace(
            statistics,
            sums=statistics.sums / scale,
            scatter=statistics.scatter / square,
            shift=torch.as_tensor(self.shift, device=statistics.sums.device),
        )


def frame_of(sample: np.ndarray, covariance_type: str) -> Frame:
    """The frame that centres ``sample`` (n, D) and brings its features near unit deviation."""
    return frames_of(sample, covariance_type)[0]


def frames_of(sample: np.ndarray, *covariance_types: str) -> tuple[Frame, ...]:
    """`frame_of` for each of ``covariance_types``, from one look at ``sample``."""
    values = np.asarray(sample, dtype=np.float64)
    mean = values.mean(axis=0)
    # In units of the range, so that squares neither overflow nor underflow; a constant feature has no deviation.
    extent = np.ptp(values, axis=0)
    unit = np.where(extent > 0, extent, np.inf)
    deviation = np.where(extent > 0, extent, 0.0) * np.sqrt(np.mean(((values - mean) / unit) ** 2, axis=0))
    peak = deviation.max() or 1.0
    common = np.full_like(deviation, peak * np.sqrt(np.mean((deviation / peak) ** 2)))
    return tuple(
        Frame.about(mean, common if kind == "spherical" else deviation, sample.dtype) for kind in covariance_types
    )
