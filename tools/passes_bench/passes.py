"""Training over the data: generators of the mixture after each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce

import numpy as np
import torch

from passes_bench.engine import REG_COVAR, Engine
from streamgmm.errors import RequestError
from streamgmm.mixture import Mixture
from streamgmm.passes import stratified_order
from streamgmm.statistics import Statistics
from streamgmm.steps.stepwise import Schedule, implied_statistics, mixed, step_size

_ADDITIVE = ("counts", "sums", "scatter", "log_likelihood", "n_rows")
_ROWS_A_PARAMETER = 2.0


def full_batch(engine: Engine, mixture: Mixture, passes: int) -> Iterator[Mixture]:
    """Exact EM, one update a pass."""
    for _ in range(passes):
        engine.rows_read += len(engine.rows)
        mixture = engine.em(mixture, engine.rows)
        yield mixture


Order = Callable[[int], Iterator[torch.Tensor]]
"""The blocks of rows of pass 0, 1, … of those that train."""


def stepwise(
    engine: Engine, mixture: Mixture, passes: int, order: Order, gamma: Callable[[int, int], float]
) -> Iterator[Mixture]:
    """One update a block of ``order``; ``gamma`` of the rows seen so far and of those in the block."""
    seen = 0
    for number in range(passes):
        for rows in engine.counted(order(number)):
            mixture = engine.stepped(mixture, rows, gamma(seen, len(rows)))
            seen += len(rows)
        yield mixture


def as_they_lie(engine: Engine, steps: int) -> Order:
    return lambda number: iter(torch.tensor_split(engine.rows, steps))


def shuffled_granules(engine: Engine, steps: int, granules: int, seed: int) -> Order:
    """As many ``granules`` in each step, of equal size, one of every stratum."""
    pieces = torch.tensor_split(engine.rows, steps * granules)

    def blocks(number: int) -> Iterator[torch.Tensor]:
        for step in stratified_order(len(pieces), steps, seed, number):
            yield torch.cat([pieces[i] for i in step])

    return blocks


def first_window(mixture: Mixture, n_sample: int, n_rows: int) -> float:
    """Rows in the first window: the sample's, or two a parameter if that is more.

    Parameters estimated from W rows cost n_parameters / 2W nats a row on others (Akaike 1974): a quarter here.
    """
    return min(n_rows, max(n_sample, _ROWS_A_PARAMETER * mixture.n_parameters))


def windowed(engine: Engine, mixture: Mixture, passes: int, order: Order, effect: float = 1.0) -> Iterator[Mixture]:
    """Stepwise passes with a window that grows to the whole data, then one of full-batch EM.

    ``effect`` is the order's design effect: rows of which only one in so many is independent need a longer window.
    """
    n = len(engine.rows)
    first = min(n, max(1.0, effect) * first_window(mixture, len(engine.sample), n))
    schedule = Schedule(first, n, (passes - 1) * n)
    yield from _finished(engine, stepwise(engine, mixture, passes - 1, order, schedule.step_size))


def decaying(engine: Engine, mixture: Mixture, passes: int, order: Order, alpha: float) -> Iterator[Mixture]:
    """γ_t = (t + 2)^−α (Liang & Klein 2009), then one full-batch pass."""
    yield from _finished(engine, stepwise(engine, mixture, passes - 1, order, lambda t, b: (t / b + 2) ** -alpha))


def _finished(engine: Engine, steps: Iterator[Mixture]) -> Iterator[Mixture]:
    """``steps``, and one full-batch pass from where they end."""
    for mixture in steps:
        yield mixture
    yield from full_batch(engine, mixture, 1)


def incremental(engine: Engine, mixture: Mixture, passes: int, block: int) -> Iterator[Mixture]:
    """Each block's sums replaced as it comes by (Neal & Hinton 1998); the start's stand in for blocks not yet seen."""
    kept: list[Statistics] = []
    n = len(engine.rows)
    for number in range(passes):
        for index, rows in enumerate(engine.blocks(block)):
            new = engine.statistics(mixture, rows)
            if number == 0:
                prior = implied_statistics(mixture, REG_COVAR, new.shift)
                kept.append(new)
            else:
                kept[index] = new
            total = reduce(Statistics.merge, kept)
            missing = n - float(total.n_rows)
            mixture = engine.updated(combined((1.0, total), (missing, prior)), mixture)
        yield mixture


def variance_reduced(engine: Engine, mixture: Mixture, passes: int, block: int, gamma: float) -> Iterator[Mixture]:
    """Turn by turn a full-batch pass, the anchor, and a pass of corrected steps (Chen et al. 2018, sEM-vr).

    A block's ŝ(θ) is corrected by what it was at the anchor: ŝ(θ) − ŝ(θ̃) + S(θ̃). Where that leaves a component without
    weight or volume, the step is an uncorrected one over a window of all rows.
    """
    anchor, mean = mixture, None
    for _ in range(passes):
        if mean is None:
            engine.rows_read += len(engine.rows)
            anchor, sums = mixture, engine.statistics(mixture, engine.rows)
            mean = combined((1 / len(engine.rows), sums))
            mixture = engine.updated(sums, mixture)
        else:
            for rows in engine.blocks(block):
                new, old = engine.statistics(mixture, rows), engine.statistics(anchor, rows)
                past = implied_statistics(mixture, REG_COVAR, new.shift)
                share = gamma / len(rows)
                state = combined((1 - gamma, past), (share, new), (-share, old), (gamma, mean))
                if not _is_proper(state):
                    state = mixed(past, new, min(gamma, step_size(len(engine.rows), len(rows))))
                mixture = engine.updated(state, mixture)
            mean = None
        yield mixture


def squarem(engine: Engine, mixture: Mixture, passes: int) -> Iterator[Mixture]:
    """SQUAREM (Varadhan & Roland 2008, scheme S3) on log weights, means in deviations, and log variances (diag).

    Two EM passes, then an extrapolation. The next pass, which is needed anyway, tells its likelihood: where that is
    lower than before, the pass is lost and training goes on from the last EM iterate.
    """
    fallback, reached = mixture, -np.inf
    while True:
        path = [mixture]
        while len(path) < 3:
            if passes == 0:
                return
            passes -= 1
            engine.rows_read += len(engine.rows)
            sums = engine.statistics(path[-1], engine.rows)
            value = float(sums.log_likelihood / sums.n_rows)
            if value < reached:
                path = [fallback]
            else:
                path.append(engine.updated(sums, path[-1]))
            reached = value if value >= reached else -np.inf
            yield path[-1]
        fallback = path[2]
        mixture = _extrapolated(*path) if passes else fallback


def combined(*terms: tuple[float, Statistics]) -> Statistics:
    """Σ factor · statistics, in the order given; all about the same shift."""
    sums = {name: sum(factor * getattr(statistics, name) for factor, statistics in terms) for name in _ADDITIVE}
    return replace(terms[0][1], **sums)


def _is_proper(statistics: Statistics) -> bool:
    """Whether every component has weight and no variance is negative (diag)."""
    if not bool((statistics.counts > 0).all()):
        return False
    offsets = statistics.sums / statistics.counts[:, None]
    return bool((statistics.scatter / statistics.counts[:, None] >= offsets**2).all())


def _extrapolated(first: Mixture, second: Mixture, third: Mixture) -> Mixture:
    x0, x1, x2 = (_vector(mixture) for mixture in (first, second, third))
    r, v = x1 - x0, x2 - 2 * x1 + x0
    alpha = -max(1.0, float(np.linalg.norm(r) / max(np.linalg.norm(v), 1e-300)))
    return _mixture(x0 - 2 * alpha * r + alpha**2 * v, third)


def _vector(m: Mixture) -> np.ndarray:
    deviations = np.sqrt(m.covariances)
    return np.concatenate([np.log(m.weights), (m.means / deviations).ravel(), np.log(m.covariances).ravel()])


def _mixture(vector: np.ndarray, like: Mixture) -> Mixture:
    k, d = like.means.shape
    weights = np.exp(vector[:k] - vector[:k].max())
    covariances = np.exp(np.clip(vector[k + k * d :], -30, 30)).reshape(k, d)
    means = vector[k : k + k * d].reshape(k, d) * np.sqrt(covariances)
    try:
        return Mixture(weights / weights.sum(), means, covariances, "diag")
    except RequestError:
        return like
