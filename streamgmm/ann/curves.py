"""What a search finds, and what it costs, by how far it goes.

A cost is a number of distances: one to each centroid, and one to each vector of the lists that are looked into, counted
once however many of them hold it (*unique*) or as often as it is there (*scanned*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.ann.policies import NO_LIST
from streamgmm.ann.probing import Ranked

_PAIR_LISTS = 4096
"""Up to so many lists, pairs of them are counted in a table."""

_QUERIES = 32
_THRESHOLDS = 400


@dataclass(frozen=True, eq=False)
class Tally:
    """Per query, after each of its first P lists: the share of its neighbours found, and vectors seen.

    Attributes
    ----------
    found : (Q, P) fp32 tensor
    unique, scanned : (Q, P) fp32 tensors
    """

    found: Tensor
    unique: Tensor
    scanned: Tensor


def tally(ranked: Ranked, table: NDArray[np.int32], truth: NDArray[np.int64], n_lists: int) -> Tally:
    """Follow each query through its lists.

    Parameters
    ----------
    table : (N, C) array
        The lists of every vector, -1 for none.
    truth : (Q, k) array
        Row numbers of the true neighbours, -1 for none.
    """
    lists = torch.from_numpy(table.astype(np.int64))
    lists = torch.where(lists == NO_LIST, n_lists, lists)
    sizes = torch.bincount(lists.flatten(), minlength=n_lists + 1)[:n_lists].float()
    scanned = sizes[ranked.lists].cumsum(1)
    place = torch.full((len(ranked.lists), n_lists + 1), n_lists, dtype=torch.int64)
    place.scatter_(1, ranked.lists, torch.arange(ranked.lists.shape[1]).expand_as(ranked.lists))
    found = _found(place, lists, torch.from_numpy(truth), ranked.lists.shape[1])
    if lists.shape[1] == 1:
        return Tally(found, scanned, scanned)
    if lists.shape[1] == 2 and n_lists <= _PAIR_LISTS:
        return Tally(found, scanned - _seen_twice(ranked.lists, lists, n_lists), scanned)
    return Tally(found, _unique(place, lists, ranked.lists.shape[1]), scanned)


def _found(place: Tensor, lists: Tensor, truth: Tensor, width: int) -> Tensor:
    """Share of each query's neighbours in its first 1, 2, … lists, (Q, width)."""
    exist = truth >= 0
    own = lists[truth.clamp(min=0)]
    first = place.gather(1, own.flatten(1)).view(own.shape).amin(2)
    first = torch.where(exist & (first < width), first, width)
    counts = torch.zeros(len(place), width + 1).scatter_add_(1, first, torch.ones_like(first, dtype=torch.float32))
    return counts[:, :width].cumsum(1) / exist.sum(1, keepdim=True).clamp(min=1)


def _seen_twice(order: Tensor, lists: Tensor, n_lists: int) -> Tensor:
    """Vectors with both their lists among the first 1, 2, … of a query's, (Q, P)."""
    both = lists[lists[:, 1] < n_lists]
    pairs = torch.bincount(both[:, 0] * n_lists + both[:, 1], minlength=n_lists**2).view(n_lists, n_lists).float()
    pairs = pairs + pairs.T
    parts = []
    for own in order.split(_QUERIES):
        shared = pairs[own[:, :, None], own[:, None, :]]
        parts.append(torch.triu(shared, 1).sum(1).cumsum(1))
    return torch.cat(parts)


def _unique(place: Tensor, lists: Tensor, width: int) -> Tensor:
    """Different vectors in the first 1, 2, … of a query's lists, (Q, P): by the first list that holds each."""
    parts = []
    for own in place.int():
        first = own[lists[:, 0]]
        for column in range(1, lists.shape[1]):
            first = torch.minimum(first, own[lists[:, column]])
        parts.append(torch.bincount(first, minlength=width)[:width].cumsum(0).float())
    return torch.stack(parts)


@dataclass(frozen=True, eq=False)
class Curve:
    """A tally at a grid of stopping values, coarse distances included.

    Attributes
    ----------
    values : (T,) array
        Stopping values, rising.
    recall, unique, scanned : (Q, T) float32 arrays
    """

    values: NDArray[np.float64]
    recall: NDArray[np.float32]
    unique: NDArray[np.float32]
    scanned: NDArray[np.float32]

    def at(self, recall: float) -> Point | None:
        """Means over queries where ``recall`` is just reached; None where it never is.

        Between two stopping values queries are thought to be divided.
        """
        reached, unique, scanned = (part.mean(0, dtype=np.float64) for part in (self.recall, self.unique, self.scanned))
        cost, at = crossing(reached, unique, recall)
        if at == len(reached):
            return None
        return Point(float(self.values[at]), cost, crossing(reached, scanned, recall)[0])

    def recall_at(self, unique: float) -> float | None:
        """Mean recall for ``unique`` distances a query; None where even the least takes more, or the most fewer."""
        reached, cost = (part.mean(0, dtype=np.float64) for part in (self.recall, self.unique))
        if not cost[0] <= unique <= cost[-1]:
            return None
        return float(np.interp(unique, cost, reached))


def crossing(reached: NDArray[Any], cost: NDArray[Any], recall: float) -> tuple[float, int]:
    """``cost`` (T,) where ``reached`` (T,), rising, meets ``recall``, and the place at or beyond; NaN, T if nowhere."""
    at = int(np.searchsorted(reached, recall - 1e-6))
    if at == len(reached):
        return float("nan"), at
    part = 1.0
    if at and reached[at] > reached[at - 1]:
        part = float(np.clip((recall - reached[at - 1]) / (reached[at] - reached[at - 1]), 0, 1))
    before = cost[max(at - 1, 0)]
    return float(before + (cost[at] - before) * part), at


@dataclass(frozen=True)
class Point:
    """Means over queries at one place of a curve; ``value`` is the stopping value that reaches it."""

    value: float
    unique: float
    scanned: float


def curve(ranked: Ranked, tallied: Tally, n_lists: int, *, by_count: bool) -> Curve:
    """`Tally` on a grid of stopping values; ``by_count`` says that they are numbers of lists."""
    if by_count:
        values = np.arange(1, tallied.found.shape[1] + 1, dtype=np.float64)
        parts = [part.numpy() for part in (tallied.found, tallied.unique + n_lists, tallied.scanned + n_lists)]
        return Curve(values, *parts)
    # Evenly by recall gained, so that the steep end has as many as the flat one; up to the whole.
    gain = torch.diff(tallied.found, dim=1, prepend=torch.zeros_like(tallied.found[:, :1])).flatten()
    keys = ranked.keys.flatten()
    helpful = keys[gain > 0].sort().values
    picked = torch.linspace(0, 1, _THRESHOLDS) ** 0.5 * (len(helpful) - 1)
    values = torch.unique(helpful[picked.round().long()])
    position = torch.searchsorted(
        ranked.keys.contiguous(), values.expand(len(ranked.keys), -1).contiguous(), right=True
    )
    position = position.clamp(min=1) - 1
    grown = (tallied.found, tallied.unique + n_lists, tallied.scanned + n_lists)
    parts = [part.gather(1, position).numpy() for part in grown]
    return Curve(values.numpy(), *parts)
