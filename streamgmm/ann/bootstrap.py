"""How far a cost, or a ratio of costs, would differ with other queries and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.curves import Curve, crossing

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Draws:
    """Resamples of the queries and of the seeds, after the sample itself; the same for every row that is compared.

    Attributes
    ----------
    queries : (B + 1, Q) array
        How often each query is drawn.
    seeds : (B + 1, S) array
    """

    queries: Float
    seeds: NDArray[np.int64]

    @classmethod
    def of(cls, n_queries: int, n_seeds: int, count: int, rng: np.random.Generator) -> Draws:
        queries = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), count)
        seeds = rng.integers(0, n_seeds, (count, n_seeds))
        return cls(
            np.concatenate([np.ones((1, n_queries)), queries]).astype(np.float64),
            np.concatenate([np.arange(n_seeds)[None], seeds]),
        )

    def unique(self, curves: Sequence[Curve], recalls: Sequence[float]) -> Float:
        """Mean cost over the drawn seeds at each recall, (R, B + 1); NaN where one of them does not reach it.

        ``curves`` are one a seed, or a single one where nothing depends on the seed.
        """
        by_seed = np.stack([self._of_one(one, recalls) for one in curves], 2)
        chosen = np.broadcast_to(self.seeds % len(curves), (len(recalls), *self.seeds.shape))
        return np.asarray(np.take_along_axis(by_seed, chosen, 2).mean(2))

    def _of_one(self, one: Curve, recalls: Sequence[float]) -> Float:
        share = self.queries / self.queries.sum(1, keepdims=True)
        reached, unique = (share @ part.astype(np.float64) for part in (one.recall, one.unique))
        pairs = list(zip(reached, unique, strict=True))
        return np.array([[crossing(found, cost, recall)[0] for found, cost in pairs] for recall in recalls])


def interval(values: Float) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of what was drawn (the first value is the sample itself)."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn):
        return None, None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
