"""What each granule adds up to, added to the totals of the runs of rows that a call is made of, in the rows' order.

Runs whose totals lie behind each other in memory, as those of `Statistics.several` do, share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
from torch import Tensor

from streamgmm.kernels import Run
from streamgmm.kernels.fused import sums as sum_code
from streamgmm.kernels.fused.parameters import FusedParameters
from streamgmm.kernels.fused.working import Partials
from streamgmm.statistics import ADDITIVE, Statistics

Flagged: TypeAlias = tuple[Tensor, int]
"""Flags, int32 on the device, and how many of them count: where one is set, nothing is added."""


@dataclass(frozen=True, eq=False)
class Totals:
    """The fields of the `Statistics` of some runs that follow one another, (runs, ·) each.

    Attributes
    ----------
    ends : (runs + 1,) int32 tensor
        A run's granules are from its own to before the next one's.
    """

    counts: Tensor
    sums: Tensor
    scatter: Tensor
    log_likelihood: Tensor
    n_rows: Tensor
    ends: Tensor

    def add_components(self, partials: Partials, parameters: FusedParameters, first: int, unless: Flagged) -> None:
        """Add the partials of the components in the places from ``first`` on."""
        n_components, d = self.sums.shape[1:]
        n = min(partials.counts.shape[1], n_components - first)
        stride = partials.sums.shape[2]
        block = min(stride, 128)
        sum_code.add_partials[(n, triton.cdiv(d, block), len(self.counts))](
            self.counts, self.sums, self.scatter, parameters.order[first:],
            partials.counts, partials.sums, partials.scatter,
            n_components, self.ends, partials.counts.shape[1], *unless,
            D=d, STRIDE=stride, DIAG=parameters.is_diag, NORM=parameters.uses_norms, BLOCK=block, num_warps=1,
        )  # fmt: skip

    def add_moments(self, moments: Tensor, unless: Flagged) -> None:
        """Add each granule's Σ yyᵀ of ``tied``, (granules, D', D')."""
        runs, *_, width = self.scatter.shape
        size, block = self.scatter[0].numel(), 256
        sum_code.add_in_order[(triton.cdiv(size, block), runs)](
            self.scatter, moments, size, width, moments.shape[1], self.ends, moments.stride(0), *unless, BLOCK=block,
        )  # fmt: skip

    def add_rows(self, row_sums: Tensor, unless: Flagged) -> None:
        """Add each granule's Σ w log p and Σ w, (granules, 2)."""
        sum_code.add_rows[(len(self.n_rows),)](self.log_likelihood, self.n_rows, row_sums, self.ends, *unless)


def totals_of(runs: Sequence[Run], granule: int) -> list[Totals]:
    """The statistics of a call's runs, as few `Totals` as their memory allows."""
    groups = list[list[Run]]()
    for run in runs:
        if groups and _follows(run.statistics, groups[-1][-1].statistics):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [_totals(group, granule) for group in groups]


def _totals(runs: list[Run], granule: int) -> Totals:
    first = runs[0].statistics
    fields = {name: _stacked(getattr(first, name), len(runs)) for name in ADDITIVE}
    ends = torch.tensor([*(run.start // granule for run in runs), -(-runs[-1].stop // granule)], dtype=torch.int32)
    if first.counts.is_cuda:  # from pageable memory the host would wait for the device
        ends = ends.pin_memory().to(first.counts.device, non_blocking=True)
    return Totals(**fields, ends=ends)


def _stacked(first: Tensor, n: int) -> Tensor:
    """``n`` tensors, of which this is the ``first``, as one."""
    return first.as_strided((n, *first.shape), (first.numel(), *first.stride()))


def _follows(later: Statistics, earlier: Statistics) -> bool:
    return all(_behind(getattr(earlier, name), getattr(later, name)) for name in ADDITIVE)


def _behind(first: Tensor, second: Tensor) -> bool:
    return (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + first.numel()
        and first.is_contiguous()
        and second.is_contiguous()
    )
