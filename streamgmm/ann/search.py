"""Searches in an index whose vectors may be in several lists: each is found once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.faiss_files import read_index
from streamgmm.ann.faiss_index import IndexFacts
from streamgmm.ann.placement import NO_ID
from streamgmm.ann.policies import NO_LIST
from streamgmm.ann.probing import Probing, rank_lists, with_keys
from streamgmm.ann.quantizer import Quantizer
from streamgmm.errors import RequestError

_QUERIES = 256


@dataclass(frozen=True, eq=False)
class Searcher:
    """Attributes
    ----------
    index : faiss.IndexIVF
    facts : IndexFacts
        Of the copies that a vector has.
    """

    index: Any
    facts: IndexFacts

    @classmethod
    def open(cls, path: str | Path) -> Searcher:
        """The index at ``path``. Raises as `read_index`."""
        return cls(*read_index(path))

    def search(
        self,
        queries: NDArray[Any],
        k: int,
        probing: Probing | int = 1,
        quantizer: Quantizer | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared distances (Q, k) and ids (Q, k) of the ``k`` nearest vectors, each once, nearest first.

        ``probing`` is a number of lists, or a rule; one by posterior needs the ``quantizer``. A query whose lists hold
        fewer than ``k`` vectors looks into twice as many, and so on. Where there are fewer in all, the rest is id -1,
        distance infinity.

        Raises
        ------
        RequestError
            Queries of another dimension or not finite; ``k`` or the number of lists below 1.
        """
        x = self._checked(queries)
        if k < 1 or k != int(k):
            raise RequestError(f"k must be a whole number, 1 at least; got {k}")
        k = int(k)
        rule = probing if isinstance(probing, Probing) else Probing(value=int(probing), most=max(1, int(probing)))
        if (rule.ranking == "posterior" or rule.stop == "mass") and quantizer is None:
            raise RequestError("posteriors need the quantizer; give it, or rank by distance and stop by another rule")
        distances: NDArray[np.float32] = np.full((len(x), k), np.inf, np.float32)
        ids: NDArray[np.int64] = np.full((len(x), k), NO_ID, np.int64)
        exist = min(k, self.facts.n_samples)
        for start in range(0, len(x), _QUERIES):
            piece = slice(start, start + _QUERIES)
            lists = self._lists(x[piece], rule, quantizer)
            distances[piece], ids[piece] = self._found(x[piece], k, *lists)
        width = int(rule.value) if rule.stop == "count" else rule.most
        while (short := np.flatnonzero((ids != NO_ID).sum(1) < exist)).size and width < self.index.nlist:
            width = min(max(2 * width, 2), self.index.nlist)
            for start in range(0, len(short), _QUERIES):
                rows = short[start : start + _QUERIES]
                lists = self._lists(x[rows], Probing(value=width, most=width), None)
                distances[rows], ids[rows] = self._found(x[rows], k, *lists)
        return distances, ids

    def _checked(self, queries: NDArray[Any]) -> NDArray[np.float32]:
        try:
            with np.errstate(over="ignore"):
                x = np.ascontiguousarray(queries, dtype=np.float32)
        except (TypeError, ValueError):
            raise RequestError(f"queries must be numbers; got {type(queries).__name__}; give an array") from None
        if x.ndim != 2 or x.shape[1] != self.index.d:
            raise RequestError(f"queries must have shape (Q, {self.index.d}) as the index has; got {x.shape}")
        if not np.isfinite(x).all():
            row = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
            raise RequestError(f"queries must be finite; query {row} holds NaN or infinity")
        return x

    def _lists(
        self, x: NDArray[np.float32], rule: Probing, quantizer: Quantizer | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances to, and numbers of, the lists to look into; -1 behind the last."""
        if rule.ranking == "distance" and rule.stop != "mass":
            most = min(int(rule.value) if rule.is_plain else rule.most, self.index.nlist)
            distances, lists = self.index.quantizer.search(x, most)
            if rule.is_plain:
                return distances, lists
            ranked = with_keys(torch.from_numpy(lists), torch.from_numpy(distances), rule)
        else:
            assert quantizer is not None
            ranked = rank_lists(torch.from_numpy(x), quantizer, rule)
        beyond = torch.arange(ranked.lists.shape[1]) >= ranked.kept(rule.value)[:, None]
        return ranked.distances.numpy(), ranked.lists.masked_fill(beyond, NO_LIST).numpy()

    def _found(
        self, x: NDArray[np.float32], k: int, distances: NDArray[np.float32], lists: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        fetched = min(k * self.facts.max_copies, max(1, self.index.ntotal))
        self.index.nprobe = lists.shape[1]
        found_distances, found_ids = self.index.search_preassigned(x, fetched, lists, distances)
        return without_duplicates(found_distances, found_ids, k)


def without_duplicates(
    distances: NDArray[np.float32], ids: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The first ``k`` different ids of each row, in order; id -1 and distance infinity behind the last.

    ``distances`` and ``ids`` (Q, m) are nearest first; an id's nearest copy is kept.
    """
    order = ids.argsort(axis=1, kind="stable")
    by_id = np.take_along_axis(ids, order, 1)
    again = np.zeros(ids.shape, bool)
    np.put_along_axis(again, order[:, 1:], by_id[:, 1:] == by_id[:, :-1], 1)
    dropped = again | (ids == NO_ID)
    front = dropped.argsort(axis=1, kind="stable")[:, :k]
    kept_ids: NDArray[np.int64] = np.full((len(ids), k), NO_ID, np.int64)
    kept: NDArray[np.float32] = np.full((len(ids), k), np.inf, np.float32)
    gone = np.take_along_axis(dropped, front, 1)
    kept_ids[:, : front.shape[1]] = np.where(gone, NO_ID, np.take_along_axis(ids, front, 1))
    kept[:, : front.shape[1]] = np.where(gone, np.inf, np.take_along_axis(distances, front, 1))
    return kept, kept_ids
