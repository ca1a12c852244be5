"""The nearest centroids of rows, in three launches.

Rows are centred, scaled by a power of two and rounded to fp16. Products of rows and centroids then rank the members of
each of some hundred groups of centroids, of which a row keeps the best, and the best of these are measured in fp32.

The nearest and the second are those of the definition, up to fp16's rounding of the products. Of farther ones a row
misses those with two nearer ones in the same group: 3 rows of 100 miss one of the 16 nearest (`Grouping`), which is
there replaced by the 17th. Every result depends on the row and the centroids alone, whatever rows are given with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

from streamgmm.device import on
from streamgmm.kernels.fused.configs import Tile, stride_of
from streamgmm.kernels.neighbours import narrowing, refining, scoring
from streamgmm.kernels.neighbours.grouping import MEMBER_BITS, SCRAMBLE, Grouping, step_of, tile_of

LEAST_SLOTS = 4
"""Centroids measured in fp32 at least, where there are so many."""

_FEATURES_AT_ONCE = 128
_FEATURES_APART = 16
"""Four threads read 16 bytes each of a centroid, so that a warp reads eight at once. From 32 on a row's own features
would come to threads through shared memory, and loads would wait for its barriers."""

_ROWS_OF_A_WARP = 8
_GROUPS_AT_ONCE = 512
_MOST_SCALE = 60
_ABSENT = 1e30
"""½‖c‖² of a column without a centroid."""


class Neighbours(NamedTuple):
    """The m nearest centroids of n rows, nearest first; ties go to the lower index.

    Attributes
    ----------
    lists : (n, m) int64 tensor
    distances : (n, m) fp32 tensor
        ‖x − c‖²; not a number, or infinite, where the row is.
    inner : (n, m) fp32 tensor
        r·r' with the residual of the nearest centroid.
    """

    lists: Tensor
    distances: Tensor
    inner: Tensor


@dataclass(frozen=True)
class Choice:
    """How a second list is chosen, by its residual r' and the nearest one's r.

    Attributes
    ----------
    columns : int
        1 for the nearest alone, or 2.
    loss : {'top2', 'soar', 'air'}
        ‖r'‖², ‖r'‖² + λ (r·r')²/‖r‖² or ‖r'‖² + λ r·r'.
    strength : float
        λ.
    gate : float
        Infinity keeps every second list.
    """

    NO_LIST: ClassVar[int] = -1

    columns: int
    loss: str
    strength: float
    gate: float


@dataclass(frozen=True, eq=False)
class Search:
    """Centroids as the launches read them.

    Attributes
    ----------
    points : (K, D) fp32 tensor
        About ``shift``.
    shift : (D,) fp32 tensor
        About their mean.
    narrow : (columns, D') fp16 tensor
        Points times ``scale``, in the order of ``grouping``, zero in the padding.
    half_norms : (columns,) fp32 tensor
        ½‖c‖² of the rounded points.
    scale : (1,) fp32 tensor
        A power of two.
    """

    points: Tensor
    shift: Tensor
    narrow: Tensor
    half_norms: Tensor
    scale: Tensor
    grouping: Grouping
    tile: Tile

    @classmethod
    def of(cls, points: Tensor, shift: Tensor, architecture: str, tile: Tile | None = None) -> Search:
        """Of ``points`` (K, D) fp32 about ``shift`` (D,) fp64, with the tiles of an architecture of `configs`."""
        k, d = points.shape
        # Rows are centred in fp32: what is taken from them must be what was taken from the centroids.
        points = (points.double() + (shift - shift.float())).float()
        tile = tile or tile_of(d, architecture)
        grouping = Grouping.of(k, tile.components)
        largest = float(points.abs().max())
        # The largest feature lies in [128, 256): neither a product nor a small feature leaves fp16's range soon.
        exponent = 7 - math.frexp(largest)[1] + 1 if 0 < largest < math.inf else 0
        scale = 2.0 ** max(-_MOST_SCALE, min(exponent, _MOST_SCALE))
        own = grouping.centroids().to(points.device)
        there = own < k
        narrow = torch.zeros((len(own), stride_of(d)), dtype=torch.float16, device=points.device)
        narrow[there, :d] = (points * scale).half()[own[there]]
        half_norms = torch.full((len(own),), _ABSENT, dtype=torch.float32, device=points.device)
        half_norms[there] = 0.5 * torch.linalg.vector_norm(narrow, dim=1, dtype=torch.float32).square()[there]
        scales = torch.full((1,), scale, dtype=torch.float32, device=points.device)
        return cls(points, shift.float(), narrow, half_norms, scales, grouping, tile)

    @staticmethod
    def scratch_bytes(n_lists: int, n_features: int, m: int, architecture: str) -> tuple[int, int]:
        """Device memory of a row while its neighbours are sought, results not counted, and of the columns."""
        grouping = Grouping.of(n_lists, tile_of(n_features, architecture).components)
        stride, columns = stride_of(n_features), grouping.groups * grouping.members
        # While columns are made there are the scaled points and their numbers besides.
        return 2 * stride + 8 + 4 * grouping.groups * _kept(m), columns * (10 * stride + 32)

    def __call__(self, rows: Tensor, m: int) -> Neighbours:
        """The ``m`` nearest centroids of rows (n, D) of a stored type, 1 ≤ m ≤ K; all but float64."""
        with on(rows.device):
            return self._found(rows.contiguous(), m)

    def lists(self, rows: Tensor, m: int, choice: Choice) -> tuple[Tensor, Tensor]:
        """Lists (n, columns) int32 of rows as in a call, the nearest first, and gains (n,) fp32.

        The second is the centroid of least loss among the ``m`` nearest, or `Choice.NO_LIST` where its gain, the loss
        over the least ‖x − c‖², less 1, is not below the gate. A gain is not a number if and only if one of the m
        distances is not finite. With two columns m is at least 2.
        """
        with on(rows.device):
            return self._chosen(rows.contiguous(), m, choice)

    def _found(self, rows: Tensor, m: int) -> Neighbours:
        n, device = len(rows), rows.device
        winners = self._winners(rows, _kept(m))
        lists = torch.empty((n, m), dtype=torch.int64, device=device)
        distances, inner = (torch.empty((n, m), dtype=torch.float32, device=device) for _ in range(2))
        refining.refine[_programs(n)](
            rows, self.shift, self.points, winners, lists, distances, inner,
            n, len(self.points), self.grouping.groups, m, **self._constants(m),
        )  # fmt: skip
        return Neighbours(lists, distances, inner)

    def _chosen(self, rows: Tensor, m: int, choice: Choice) -> tuple[Tensor, Tensor]:
        n, device = len(rows), rows.device
        winners = self._winners(rows, _kept(m))
        lists = torch.empty((n, choice.columns), dtype=torch.int32, device=device)
        gains = torch.empty(n, dtype=torch.float32, device=device)
        refining.choose[_programs(n)](
            rows, self.shift, self.points, winners, lists, gains, choice.strength, choice.gate,
            n, len(self.points), self.grouping.groups, m,
            LOSS=choice.loss, COLUMNS=choice.columns, NO_LIST=choice.NO_LIST, **self._constants(m),
        )  # fmt: skip
        return lists, gains

    def _constants(self, m: int) -> dict[str, Any]:
        """What the last launch is compiled for, and its warp."""
        d, keep = self.points.shape[1], _kept(m)
        groups = self.grouping.groups
        span = min(_FEATURES_AT_ONCE, max(16, 1 << (d - 1).bit_length()))
        return {
            "D": d, "PLACES": self.grouping.places, "KEEP": keep, "MASK": self.grouping.mask, "SCRAMBLE": SCRAMBLE,
            "MEMBER_BITS": MEMBER_BITS, "ONE_BLOCK": groups <= _GROUPS_AT_ONCE,
            "BLOCK": min(1 << (groups - 1).bit_length(), _GROUPS_AT_ONCE),
            "SLOTS": max(LEAST_SLOTS, 1 << (m - 1).bit_length()), "SPAN": span, "PART": min(span, _FEATURES_APART),
            "EACH": _ROWS_OF_A_WARP, "num_warps": 1, "num_stages": 1,
        }  # fmt: skip

    def _winners(self, rows: Tensor, keep: int) -> Tensor:
        """The best ``keep`` of each group for each row, (padded n, groups · keep) fp32; see `scoring`."""
        (n, d), tile, grouping = rows.shape, self.tile, self.grouping
        stride = self.narrow.shape[1]
        n_padded = -(-n // tile.rows) * tile.rows
        x = torch.empty((n_padded, stride), dtype=torch.float16, device=rows.device)
        halves, units = (torch.empty(n_padded, dtype=torch.float32, device=rows.device) for _ in range(2))
        narrowing.narrow_rows[(n_padded // 32,)](
            rows, self.shift, self.scale, x, halves, units, n,
            D=d, STRIDE=stride, BLOCK_ROWS=32, BLOCK_FEATURES=min(stride, 128), num_warps=4,
        )  # fmt: skip
        winners = torch.empty((n_padded, grouping.groups * keep), dtype=torch.float32, device=rows.device)
        scoring.group_winners[(n_padded // tile.rows,)](
            x, halves, units, self.narrow, self.half_norms, winners,
            len(self.narrow) // tile.components, winners.shape[1],
            STRIDE=stride, STEP=step_of(d), PLACES=grouping.places, RUN=grouping.run, KEEP=keep,
            MEMBER_BITS=MEMBER_BITS, BLOCK_ROWS=tile.rows, TILE=tile.components,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return winners


def _kept(m: int) -> int:
    """Of each group. The nearest of all is the nearest of its group; the two nearest may be of the same one."""
    return 1 if m == 1 else 2


def _programs(n_rows: int) -> tuple[int]:
    return (triton.cdiv(n_rows, _ROWS_OF_A_WARP),)
