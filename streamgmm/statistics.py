"""Additive sufficient statistics, and the one order in which they are summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, TypeAlias

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


def longest_segment(n_samples: int) -> int:
    """Rows of the longest segment."""
    return max(last - first for first, last in segment_bounds(n_samples))


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
        (one,) = cls.several(1, covariance_type, n_components, shift, device)
        return one

    @classmethod
    def several(
        cls, n: int, covariance_type: str, n_components: int, shift: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Statistics, ...]:
        """``n`` of `zeros`, which share their memory's blocks: few allocations, that last as long as one of them."""
        d = int(shift.shape[0])
        shift = shift.to(device=device, dtype=torch.float64)

        def empty(*shape: int) -> Sequence[Tensor]:
            return torch.zeros((n, *shape), dtype=torch.float64, device=device).unbind()

        fields = (empty(n_components), empty(n_components, d), empty(*scatter_shape(covariance_type, n_components, d)))
        return tuple(cls(*own, shift, covariance_type) for own in zip(*fields, empty(), empty(), strict=True))

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows; both must be about the same shift."""
        (both,) = merged([(self, other)])
        return both

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
        return replace(self, **{name: getattr(self, name).to(device) for name in (*ADDITIVE, "shift")})

    def clone(self) -> Statistics:
        """A copy that later additions to this one do not touch."""
        return replace(self, **{name: getattr(self, name).clone() for name in ADDITIVE})

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor by name, where it lies."""
        return {f"{prefix}{name}": getattr(self, name) for name in (*ADDITIVE, "shift")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], covariance_type: str, prefix: str = "") -> Statistics:
        """The inverse of `tensors`, in the memory of ``tensors``."""
        fields = {name: tensors[f"{prefix}{name}"] for name in (*ADDITIVE, "shift")}
        return cls(**fields, covariance_type=covariance_type)


ADDITIVE = ("counts", "sums", "scatter", "log_likelihood", "n_rows")
"""The fields of `Statistics` that sums of rows add up to."""


def merged(pairs: Sequence[tuple[Statistics, Statistics]]) -> list[Statistics]:
    """What `Statistics.merge` gives for each of ``pairs``, in as few launches as there would be for one."""
    left, right = ([getattr(pair[side], name) for pair in pairs for name in ADDITIVE] for side in (0, 1))
    sums: Iterator[Any] = iter(torch._foreach_add(left, right) if pairs else ())
    return [replace(first, **{name: next(sums) for name in ADDITIVE}) for first, _ in pairs]


@dataclass(frozen=True)
class SummationTree:
    """A pairwise sum of the 64 segments that holds only what is not joined yet.

    Node (level, index) is the sum of segments [index·2^level, (index + 1)·2^level). Siblings join, left plus right, as
    soon as both are there: the shape of the sum never depends on who computed which segment, or when. ``None`` stands
    for the sum of empty segments.

    Attributes
    ----------
    nodes : tuple of ((level, index), sum)
        In the order of the segments, none of them twice.
    """

    nodes: tuple[tuple[_Node, Statistics | None], ...] = ()

    @classmethod
    def over(cls, n_samples: int) -> SummationTree:
        """The tree of a pass over ``n_samples`` rows in which nothing but empty segments is summed."""
        return cls.of(segment for segment, (first, last) in enumerate(segment_bounds(n_samples)) if first < last)

    @classmethod
    def of(cls, segments: Iterable[int]) -> SummationTree:
        """The tree in which only ``segments`` are yet to be summed; the others are empty."""
        return _empty_tree(frozenset(segments))

    @property
    def finished(self) -> frozenset[int]:
        """The segments that were placed."""
        return frozenset(chain.from_iterable(_leaves(node) for node, _ in self.nodes))

    @property
    def complete(self) -> bool:
        """Whether every segment was placed."""
        return [node for node, _ in self.nodes] == [_ROOT]

    def place(self, sums: Mapping[int, Statistics | None]) -> SummationTree:
        """The tree with the sums of some segments added, in any order.

        Raises
        ------
        ValueError
            One is there already.
        """
        return self._joined({(0, segment): own for segment, own in sums.items()})

    def merge(self, other: SummationTree) -> SummationTree:
        """The tree with every segment of two that share none. Raises as `place`."""
        return self._joined(dict(other.nodes))

    def total(self) -> Statistics:
        """The sum of a complete pass.

        Raises
        ------
        ValueError
            Segments are missing, or every one is empty.
        """
        if not self.complete:
            raise ValueError(f"{SEGMENTS - len(self.finished)} segments are not summed yet")
        total = self.nodes[0][1]
        if total is None:
            raise ValueError("the pass held no rows")
        return total

    def _joined(self, new: Mapping[_Node, Statistics | None]) -> SummationTree:
        """The tree with ``new`` nodes, of which none lies under another."""
        if twice := self.finished.intersection(chain.from_iterable(map(_leaves, new))):
            raise ValueError(f"segment {min(twice)} is summed twice")
        nodes = dict(self.nodes) | dict(new)
        while pairs := [node for node in nodes if node[1] % 2 == 0 and (node[0], node[1] + 1) in nodes]:
            siblings = [(nodes.pop(node), nodes.pop((node[0], node[1] + 1))) for node in pairs]
            both = iter(merged([(left, right) for left, right in siblings if left is not None and right is not None]))
            for (level, index), (left, right) in zip(pairs, siblings, strict=True):
                joined = right if left is None else left if right is None else next(both)
                nodes[level + 1, index // 2] = joined
        return SummationTree(tuple(sorted(nodes.items(), key=lambda item: item[0][1] << item[0][0])))


_Node: TypeAlias = "tuple[int, int]"

_ROOT = (SEGMENTS.bit_length() - 1, 0)


@lru_cache
def _empty_tree(segments: frozenset[int]) -> SummationTree:
    """Every step over the same segments begins with it."""
    return SummationTree().place({segment: None for segment in range(SEGMENTS) if segment not in segments})


def _leaves(node: tuple[int, int]) -> range:
    level, index = node
    return range(index << level, index + 1 << level)
