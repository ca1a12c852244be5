"""Rows that stay on a device as ``medium`` works with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from streamgmm.device import on
from streamgmm.frame import Frame
from streamgmm.kernels.fused.configs import LEAST_GRANULE, ROW_PADDING, stride_of
from streamgmm.kernels.fused.half_form import convert_half
from streamgmm.kernels.fused.parameters import Origins, origins_of
from streamgmm.kernels.kept import UNIT, KeptRows

_ALIGNMENT = 4096  # of each plane: kernels are compiled for the alignment of their arguments
_SCRATCH_BYTES = 16 << 20  # of rows with their padding, once a kernel's own scratch is free again


@dataclass(frozen=True, eq=False)
class HalfKept:
    """`KeptForm` of ``spherical`` and ``diag``: what `convert_half` gives, a function of rows and frame alone.

    The planes of x, norms and flags lie one after the other.
    """

    frame: Frame
    covariance_type: str
    device: torch.device

    @property
    def key(self) -> Hashable:
        return self.covariance_type, self.frame.shift.tobytes(), self.frame.scale.tobytes()

    def size(self, rows: int) -> int:
        return sum(self._planes(rows))

    def narrow(self, rows: Tensor, place: Tensor) -> None:
        kept, kind = self.rows(place, len(rows), _no_rows), self.covariance_type
        kept.flags.zero_()
        at_once = max(1, _SCRATCH_BYTES // (2 * stride_of(rows.shape[1]) * UNIT)) * UNIT
        with on(rows.device):
            for first in range(0, len(rows), at_once):
                own, these = kept[first : first + at_once], rows[first : first + at_once]
                n_padded = -(-len(own) // ROW_PADDING) * ROW_PADDING
                x, norms = convert_half(these, n_padded, own.flags, self._origins, kind, LEAST_GRANULE)
                own.x.copy_(x[: len(own), : own.x.shape[1]])
                own.norms.copy_(norms[: len(own.norms)])

    def rows(self, place: Tensor, n: int, stored: Callable[[int, int], Tensor]) -> KeptRows:
        wide, norms, flags = place[: self.size(n)].split(self._planes(n))
        d, has_norms = len(self.frame.shift), self.covariance_type != "diag"
        return KeptRows(
            wide[: 2 * n * d].view(torch.float16).view(n, d),
            norms[: 4 * n * has_norms].view(torch.float32),
            flags[: 4 * -(-n // UNIT)].view(torch.int32),
            stored,
        )

    def _planes(self, n: int) -> list[int]:
        """Bytes of each plane."""
        has_norms = self.covariance_type != "diag"
        needed = (2 * n * len(self.frame.shift), 4 * n * has_norms, 4 * -(-n // UNIT))
        return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in needed]

    @cached_property
    def _origins(self) -> Origins:
        return origins_of(self.frame, stride_of(len(self.frame.shift)), self.device)


def _no_rows(first: int, last: int) -> Tensor:
    raise AssertionError(f"rows {first} to {last} were not kept yet")
