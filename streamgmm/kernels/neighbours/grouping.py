"""Which centroids compete with one another in the first launch, and the tiles it is made of.

Centroids are dealt out to G *groups* of S members, and of each group a row keeps its one or two nearest. Member j of
group p is centroid j·G + (p xor h_j): of members at one distance the first is then the lower index, and centroids that
resemble each other because their numbers do (grids, halves of a split) are spread by the scrambled h_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamgmm.kernels.fused.configs import Tile, stride_of

MEMBER_BITS = 5
"""Low bits of a score that a member's number takes the place of."""

FEWEST_GROUPS = 128
"""Where there are centroids enough. Of 16 nearest, three in one of 128 groups are met in 3 rows of 100."""

LEAST_PLACES = 8
"""Groups of a tile at least: those that one thread's columns of a product belong to are then its own."""

SCRAMBLE = 40503
RESIDENT_FEATURES = 256


@dataclass(frozen=True)
class Grouping:
    """Attributes
    ----------
    n_lists : int
        Centroids.
    members : int
        S, a power of two.
    places : int
        Groups whose members share tiles, a power of two.
    run : int
        Tiles that hold all members of as many groups.
    groups : int
        G, whole runs.
    """

    n_lists: int
    members: int
    places: int
    run: int
    groups: int

    @classmethod
    def of(cls, n_lists: int, columns: int) -> Grouping:
        """Of ``n_lists`` centroids in tiles of ``columns``."""
        wanted = -(-n_lists // FEWEST_GROUPS)
        members = min(max(2, 1 << (wanted - 1).bit_length()), 1 << MEMBER_BITS)
        places = max(LEAST_PLACES, columns // members)
        groups = -(-n_lists // (members * places)) * places
        return cls(n_lists, members, places, members * places // columns, groups)

    @property
    def mask(self) -> int:
        """What h_j is cut to: whole numbers below the largest power of two that divides G."""
        return (self.groups & -self.groups) - 1

    def centroids(self) -> Tensor:
        """(S·G,) int64: the centroid of each column of the tiles; numbers from ``n_lists`` on stand for none."""
        member = torch.arange(self.members)[:, None]
        group = torch.arange(self.groups)
        own = member * self.groups + (group ^ ((member * SCRAMBLE >> 4) & self.mask))
        # Columns of a run of tiles: members first, then the groups that share it.
        return own.view(self.members, -1, self.places).transpose(0, 1).reshape(-1)


def tile_of(n_features: int, architecture: str) -> Tile:
    """Rows × centroids of one product."""
    stride = stride_of(n_features)
    reach = next(limit for limit in _TILES[architecture] if limit is None or stride <= limit)
    return _TILES[architecture][reach]


def step_of(n_features: int) -> int:
    """Features that enter one product; all of them where a program keeps its rows."""
    stride = stride_of(n_features)
    return stride if stride <= RESIDENT_FEATURES else 64


_TILES: dict[str, dict[int | None, Tile]] = {
    "hopper": {
        64: Tile(128, 128, 8, 2),
        128: Tile(128, 64, 4, 2),
        256: Tile(128, 64, 8, 2),
        None: Tile(128, 256, 8, 3),
    },
    "any": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2), None: Tile(64, 64, 4, 2)},
}
