"""Additive sufficient statistics, and the one order in which they are summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 65_536
"""Rows of the unit of summation. Part of the format: changing it changes the bits of every result."""

SEGMENTS = 64
"""Contiguous runs of blocks that a pass is divided into: the leaves of the summation tree."""


def segment_bounds(n_samples: int) -> list[tuple[int, int]]:
    """The 64 segments as half-open row ranges; some are empty when there are fewer than 64 blocks."""
    blocks = -(-n_samples // BLOCK_ROWS)
    edges = [min(n_samples, (i * blocks // SEGMENTS) * BLOCK_ROWS) for i in range(SEGMENTS)] + [n_samples]
    return list(pairwise(edges))


def scatter_shape(covariance_type: str, n_components: int, n_features: int) -> tuple[int, ...]:
    """Shape of ``Statistics.scatter``: ``full`` keeps the upper triangle, row by row."""
    return {
        "full": (n_components, n_features * (n_features + 1) // 2),
        "tied": (n_features, n_features),
        "diag": (n_components, n_features),
        "spherical": (n_components,),
    }[covariance_type]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sufficient statistics of a mixture over some rows, about a shift s.

    All tensors are fp64. With r the responsibility of component k for row x:

    Attributes
    ----------
    counts : (K,) tensor
        Σ r
    sums : (K, D) tensor
        Σ r (x − s)
    scatter : tensor
        ``full`` (K, D(D+1)/2): upper triangle of Σ r (x−s)(x−s)ᵀ; ``tied`` (D, D): Σ (x−s)(x−s)ᵀ over all rows;
        ``diag`` (K, D): Σ r (x−s)²; ``spherical`` (K,): Σ r ‖x−s‖².
    log_likelihood : () tensor
        Σ log p(x), nats
    n_rows : () tensor
        Rows seen.
    shift : (D,) tensor
        s, in the data's units.
    covariance_type : str

    References
    ----------
    Bishop, Pattern Recognition and Machine Learning (2006), eqs. 9.17–9.28.
    """

    counts: Tensor
    sums: Tensor
    scatter: Tensor
    log_likelihood: Tensor
    n_rows: Tensor
    shift: Tensor
    covariance_type: str

    @property
    def n_components(self) -> int:
        return int(self.sums.shape[0])

    @property
    def n_features(self) -> int:
        return int(self.sums.shape[1])

    @classmethod
    def zeros(
        cls, covariance_type: str, n_components: int, shift: Tensor, device: torch.device | str = "cpu"
    ) -> Statistics:
        """Statistics of no rows about ``shift`` (D,)."""
        d = int(shift.shape[0])

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            counts=empty(n_components),
            sums=empty(n_components, d),
            scatter=empty(*scatter_shape(covariance_type, n_components, d)),
            log_likelihood=empty(),
            n_rows=empty(),
            shift=shift.to(device=device, dtype=torch.float64),
            covariance_type=covariance_type,
        )

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows; both must be about the same shift."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _ADDITIVE})

    def recentre(self, shift: Tensor) -> Statistics:
        """The same statistics about another shift, exactly in real arithmetic.

        With δ the new shift minus the old: Σr(x−s') = Σr(x−s) − nδ and
        Σr(x−s')(x−s')ᵀ = Σr(x−s)(x−s)ᵀ − δ(Σr(x−s))ᵀ − (Σr(x−s))δᵀ + nδδᵀ.
        """
        shift = shift.to(device=self.sums.device, dtype=torch.float64)
        delta = shift - self.shift
        sums = self.sums - self.counts[:, None] * delta
        if self.covariance_type == "tied":
            cross = torch.outer(delta, self.sums.sum(0))
            scatter = self.scatter - cross - cross.T + self.counts.sum() * torch.outer(delta, delta)
        elif self.covariance_type == "full":
            i, j = torch.triu_indices(self.n_features, self.n_features, device=sums.device)
            cross = delta[i] * self.sums[:, j] + delta[j] * self.sums[:, i]
            scatter = self.scatter - cross + self.counts[:, None] * (delta[i] * delta[j])
        else:
            change = -2 * delta * self.sums + self.counts[:, None] * delta**2
            scatter = self.scatter + (change if self.covariance_type == "diag" else change.sum(1))
        return replace(self, sums=sums, scatter=scatter, shift=shift)

    def to(self, device: torch.device | str) -> Statistics:
        """The same statistics on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in (*_ADDITIVE, "shift")})

    def clone(self) -> Statistics:
        """A copy that later additions to this one do not touch."""
        return replace(self, **{name: getattr(self, name).clone() for name in _ADDITIVE})

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Every tensor by name, on the host, for storage."""
        return {f"{prefix}{name}": getattr(self, name).cpu().numpy() for name in (*_ADDITIVE, "shift")}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, np.ndarray],
        covariance_type: str,
        prefix: str = "",
        device: torch.device | str = "cpu",
    ) -> Statistics:
        """The inverse of `tensors`."""
        fields = {name: torch.tensor(tensors[f"{prefix}{name}"], device=device) for name in (*_ADDITIVE, "shift")}
        return cls(**fields, covariance_type=covariance_type)


_ADDITIVE = ("counts", "sums", "scatter", "log_likelihood", "n_rows")


@dataclass(frozen=True)
class SummationTree:
    """A pairwise sum of segments that holds only its open nodes.

    Two nodes of a level join as soon as both are there, as a binary counter carries, so at most log₂(64) + 1 nodes
    are open, and the shape of the sum never depends on who computed which segment, or when. ``None`` stands for the
    sum of an empty segment.
    """

    nodes: tuple[tuple[int, Statistics | None], ...] = ()

    @property
    def segments(self) -> int:
        """Segments summed so far."""
        return sum(2**level for level, _ in self.nodes)

    def place(self, segment: int, sums: Statistics) -> SummationTree:
        """The tree with the sums of ``segment`` added; the segments skipped before it are empty."""
        return self._skip_to(segment)._push(sums)

    def total(self) -> Statistics:
        """The sum of a pass whose last rows were placed.

        Raises
        ------
        ValueError
            No segment was placed.
        """
        total = self._skip_to(SEGMENTS).nodes[0][1]
        if total is None:
            raise ValueError("the pass held no rows")
        return total

    def _skip_to(self, segment: int) -> SummationTree:
        tree = self
        while tree.segments < segment:
            tree = tree._push(None)
        return tree

    def _push(self, leaf: Statistics | None) -> SummationTree:
        level, node, rest = 0, leaf, self.nodes
        while rest and rest[-1][0] == level:
            left = rest[-1][1]
            node = left if node is None else node if left is None else left.merge(node)
            level, rest = level + 1, rest[:-1]
        return SummationTree((*rest, (level, node)))
