"""The ways of probing one quantizer's lists, each measured on queries whose neighbours are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.curves import Curve, curve, tally
from streamgmm.ann.hits import HitModel, learn_hits
from streamgmm.ann.layout import Layout, Table, sizes_of
from streamgmm.ann.probing import Probing, Ranked, rank_lists
from streamgmm.ann.quantizer import Quantizer

WAYS = ("count", "odds", "margin", "mass", "posterior")
"""The four rules to stop by, L2 order; and posterior order with a fixed number of lists."""

_FIRST_LISTS = 64


@dataclass(frozen=True, eq=False)
class Asked:
    """Queries (Q, D) and the row numbers of their neighbours (Q, k)."""

    queries: NDArray[np.float32]
    truth: NDArray[np.int64]


class Ways:
    """Parameters
    ----------
    layout : Layout
    asked : sequence of Asked
        Odds are learnt on the first.
    recall : float
        The highest of interest: lists are followed until a little more is found.
    """

    def __init__(self, layout: Layout, asked: Sequence[Asked], recall: float) -> None:
        self._layout, self._asked = layout, asked
        self._enough = recall + 0.5 * (1 - recall)
        self._nearest: list[Ranked] = []

    @property
    def quantizer(self) -> Quantizer:
        return self._layout.quantizer

    def plain_cost(self, table: Table, recall: float) -> float:
        """Unique distances at ``recall`` with a fixed number of lists, on the first queries; infinite if missed."""
        point = self._curve(self._plain(table)[0], self._asked[0], table, by_count=True).at(recall)
        return float("inf") if point is None else point.unique

    def curves(self, table: Table, way: str = "count") -> tuple[Probing, list[Curve]]:
        """The rule of probing, its value yet to be chosen, and a curve for each set of queries."""
        if way == "count":
            rankings = self._plain(table)
            probing = Probing(most=rankings[0].lists.shape[1])
        else:
            most = self.quantizer.n_lists if way == "posterior" else self._plain(table)[0].lists.shape[1]
            probing = replace(self._rule(table, way), most=most)
            rankings = self._rank(probing)
        by_count = probing.stop == "count"
        pairs = zip(rankings, self._asked, strict=True)
        return probing, [self._curve(ranked, asked, table, by_count=by_count) for ranked, asked in pairs]

    def _rule(self, table: Table, way: str) -> Probing:
        if way == "posterior":
            return Probing("posterior")
        return Probing(stop="odds", hits=self._learn(table)) if way == "odds" else Probing(stop=way)

    def _learn(self, table: Table) -> HitModel:
        nearest, k = self._plain(table)[0], self.quantizer.n_lists
        found = tally(nearest, table, self._asked[0].truth, k).found
        sizes = sizes_of(table, k)
        return learn_hits(nearest.lists, nearest.distances, found, self.quantizer.centroids, sizes, self._layout.radii)

    def _plain(self, table: Table) -> list[Ranked]:
        """Nearest lists, as many as find enough by the first table that is asked about."""
        k = self.quantizer.n_lists
        most = min(_FIRST_LISTS, k)
        while not self._nearest:
            rankings = self._rank(Probing(most=most))
            reached = [
                float(tally(ranked, table, asked.truth, k).found[:, -1].mean())
                for ranked, asked in zip(rankings, self._asked, strict=True)
            ]
            if most == k or min(reached) >= self._enough:
                self._nearest = rankings
            most = min(2 * most, k)
        return self._nearest

    def _rank(self, probing: Probing) -> list[Ranked]:
        return [rank_lists(torch.from_numpy(asked.queries), self.quantizer, probing) for asked in self._asked]

    def _curve(self, ranked: Ranked, asked: Asked, table: Table, *, by_count: bool) -> Curve:
        k = self.quantizer.n_lists
        return curve(ranked, tally(ranked, table, asked.truth, k), k, by_count=by_count)
