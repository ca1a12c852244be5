"""What an evaluation says: a row a quantizer, policy and way of probing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BY_POSTERIOR = ", posterior"
"""How names of rows end whose lists are ranked by posterior; without it, those of the same lists by distance."""


@dataclass(frozen=True)
class Cost:
    """Mean distance computations a query at one recall, over test queries and seeds, centroids included.

    Attributes
    ----------
    unique, scanned : float or None
        Each vector once, or as often as it is met; None where the recall is not reached.
    low, high : float or None
        95 % bootstrap interval of ``unique``, over queries and seeds.
    gain, gain_low, gain_high : float or None
        k-means' ``unique``, with as many lists and one list a vector, over this; and its interval.
    value : float or None
        Stopping value, for the first seed.
    recall_at_cost : float or None
        Recall at the same cost: with as many unique distances as k-means needs for ``recall``.
    """

    recall: float
    unique: float | None = None
    scanned: float | None = None
    low: float | None = None
    high: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    value: float | None = None
    recall_at_cost: float | None = None


@dataclass(frozen=True)
class Row:
    """Attributes
    ----------
    name : str
    settings : mapping
        ``policy``, ``strength``, ``threshold``, ``probing``.
    lists : int
        K, and the coarse distances of a query.
    copies : float
        Lists a vector.
    index_bytes : int
        Vectors as float32 in every list they are in, ids, centroids.
    imbalance : float
        Length of a random entry's list over the mean length.
    seeds : int
    costs : sequence of Cost
        One a recall.
    curve : sequence of (recall, unique)
        For pictures; means over test queries, of the first seed.
    queries_per_second : float or None
        faiss on one thread, duplicates removed, at the highest recall, for the first seed.
    """

    name: str
    settings: Mapping[str, Any]
    lists: int
    copies: float
    index_bytes: int
    imbalance: float
    seeds: int
    costs: Sequence[Cost]
    curve: Sequence[tuple[float, float]]
    queries_per_second: float | None = None

    def gain(self, recall: float) -> float | None:
        """Over k-means, at one of the recalls."""
        return next((cost.gain for cost in self.costs if cost.recall == recall), None)


@dataclass(frozen=True)
class Evaluation:
    """Attributes
    ----------
    rows : sequence of Row
        The first is k-means with one list a vector and a fixed number of lists a query, over which gains are.
    best : str
        The row that needed the fewest unique distances at recall 0.99 on *tuning* queries, among those with as many
        lists and at most two copies.
    gain_unique_at_99 : float or None
        Its gain at recall 0.99 on test queries.
    best_fixed, gain_fixed : str, float or None
        The same among rows that look into a fixed number of lists, as the baseline does.
    """

    n_samples: int
    n_features: int
    n_queries: int
    n_tuning: int
    k: int
    n_lists: int
    rows: Sequence[Row]
    best: str
    gain_unique_at_99: float | None
    best_fixed: str
    gain_fixed: float | None

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        recalls = [cost.recall for cost in self.rows[0].costs]
        heads = "".join(f"  {f'unique at {recall:g}':>26}" for recall in recalls)
        lines = [
            f"{self.n_samples:,} vectors × {self.n_features}, recall@{self.k}, {self.n_queries:,} test queries "
            f"({self.n_tuning:,} others for tuning)",
            f"{'':<28}{'lists':>6} {'copies':>6} {'MB':>7} {'imbal.':>6}{heads} {'same cost':>9} {'scanned':>8} "
            f"{'q/s':>7}",
        ]
        for row in self.rows:
            facts = f"{row.lists:>6} {row.copies:>6.2f} {row.index_bytes / 1e6:>7.0f} {row.imbalance:>6.2f}"
            costs = "".join(f"  {_told(cost):>26}" for cost in row.costs)
            lines.append(
                f"{row.name:<28}{facts}{costs} {_share(row.costs[0].recall_at_cost):>9} "
                f"{_whole(row.costs[-1].scanned):>8} {_whole(row.queries_per_second):>7}"
            )
        lines.append(
            f"same cost: recall with the unique distances that k-means needs for {recalls[0]:g}; "
            f"scanned, copies counted, and queries a second: at {recalls[-1]:g}"
        )
        lines += self.warnings()
        gain = "–" if self.gain_unique_at_99 is None else f"{self.gain_unique_at_99:.2f}"
        fixed = "–" if self.gain_fixed is None else f"{self.gain_fixed:.2f}"
        lines.append(
            f"fewer unique distances at 0.99 than k-means: {gain} × ({self.best}), {fixed} × ({self.best_fixed})"
        )
        return lines

    def warnings(self) -> list[str]:
        """A line for each row whose ranking by posterior is worse than the same lists by distance."""
        by_name, found = {row.name: row for row in self.rows}, []
        for row in self.rows:
            plain = by_name.get(row.name.removesuffix(BY_POSTERIOR))
            if plain is None or plain is row:
                continue
            for worse, better in zip(row.costs, plain.costs, strict=True):
                if worse.unique is not None and better.unique is not None and worse.unique > better.unique:
                    times = worse.unique / better.unique
                    found.append(
                        f"warning: {row.name}: {times:.1f} × the distances at {worse.recall:g} that the same lists "
                        "take by distance; rank by distance"
                    )
        return found


def _told(cost: Cost) -> str:
    if cost.unique is None:
        return "not reached"
    if cost.gain is None or cost.gain_low is None or cost.gain_high is None:
        return f"{cost.unique:.0f}"
    return f"{cost.unique:.0f} {cost.gain:.2f}× [{cost.gain_low:.2f}, {cost.gain_high:.2f}]"


def _share(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def _whole(number: float | None) -> str:
    return "–" if number is None else f"{number:.0f}"
