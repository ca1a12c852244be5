"""Mean log-likelihoods of several models in one pass, of training rows and of held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import fsum
from operator import add

import numpy as np
import torch

from streamgmm.distributed import ALONE, Message, World, share_of
from streamgmm.estep import BoundMixture
from streamgmm.io.plan import Span, segment_spans
from streamgmm.io.ring import Ring
from streamgmm.mixture import Float64Array
from streamgmm.statistics import BLOCK_ROWS
from streamgmm.weighting import Weighting, without_nonfinite

_UNIT_ROWS = 256
"""Divides every chunk but the last, so that sums over units do not depend on how rows were cut."""

_UNITS = BLOCK_ROWS // _UNIT_ROWS


@dataclass(frozen=True)
class Evaluation:
    """One model's mean log-likelihood, nats a sample.

    Attributes
    ----------
    log_likelihood : float
        Of the training rows.
    held_out : float or None
        Of the held-out ones; None where there are none.
    n_rows : float
        Weight of the training rows.
    """

    log_likelihood: float
    held_out: float | None
    n_rows: float


class RowSum:
    """The sum of values fed in row order; where they are cut, at multiples of 256 rows, changes no bit.

    Attributes
    ----------
    blocks : list of float
        Sums of whole blocks of 65,536 rows, in order.
    """

    def __init__(self, blocks: Sequence[float] = ()) -> None:
        self.blocks = list(blocks)
        self._units: list[float] = []

    def add(self, values: Float64Array) -> None:
        """Add (n,) values; all calls but the last bring a multiple of 256."""
        whole = len(values) // _UNIT_ROWS * _UNIT_ROWS
        self._units += values[:whole].reshape(-1, _UNIT_ROWS).sum(axis=1).tolist()
        if whole < len(values):
            self._units.append(float(values[whole:].sum()))
        while len(self._units) >= _UNITS:
            self.blocks.append(fsum(self._units[:_UNITS]))
            del self._units[:_UNITS]

    def end(self) -> list[float]:
        """``blocks``, the last and shorter one among them."""
        return [*self.blocks, *([fsum(self._units)] if self._units else [])]

    @property
    def total(self) -> float:
        # Not sum: from Python 3.12 on it compensates, and the bits would depend on the version.
        return reduce(add, self.end(), 0.0)


def evaluate(
    n_samples: int,
    models: Sequence[BoundMixture],
    weighting: Weighting,
    ring: Ring,
    chunks: Callable[[Sequence[Span], Sequence[Span]], list[Span]],
    world: World = ALONE,
) -> list[Evaluation]:
    """One pass over every row for all ``models``, shared by the processes of ``world``; the leader's alone to see.

    ``chunks`` of all spans, and of those that are a process's own, gives its chunks.

    Raises
    ------
    DataError
        From a reader thread.
    """
    spans = segment_spans(n_samples)
    share = share_of(spans, world.rank, world.size)
    sums = _block_sums(chunks(spans, share), models, weighting, ring)
    # (of what, blocks): ranks own runs of whole blocks, in their order.
    parts = [message.tensors["sums"] for message in world.gather(Message(tensors={"sums": sums}))]
    if not world.leads:
        return []
    totals = [RowSum(blocks.tolist()).total for blocks in torch.cat(parts, dim=1)]
    n_rows, *likelihoods = totals[: 1 + len(models)]
    left, *held_out = totals[1 + len(models) :] or [0.0] * (1 + len(models))
    return [
        Evaluation(mine / n_rows, theirs / left if left > 0 else None, n_rows)
        for mine, theirs in zip(likelihoods, held_out, strict=True)
    ]


def _block_sums(
    spans: Sequence[Span], models: Sequence[BoundMixture], weighting: Weighting, ring: Ring
) -> torch.Tensor:
    """Of every block: the weight of training rows, and each model's likelihood of them; then of held-out ones, if any.

    (1 + models, or twice that; blocks), fp64.
    """
    sums = [[RowSum() for _ in range(1 + len(models))] for _ in range(2 if weighting.holdout else 1)]
    for chunk in ring.stream(spans):
        span, rows = chunk.span, chunk.rows
        weights = [weighting.training(span.start, span.stop)]
        if weighting.holdout:
            weights.append(weighting.held_out_weights(span.start, span.stop))
        if weighting.skip_nonfinite:
            fill = torch.from_numpy(models[0].frame.shift)
            cleaned = [without_nonfinite(rows, each, fill) for each in weights]
            rows, weights = cleaned[0][0], [each for _, each, _ in cleaned]
        likelihoods = [model.log_likelihood(rows).cpu().numpy() for model in models]
        for totals, each in zip(sums, weights, strict=True):
            totals[0].add(np.ones(span.rows) if each is None else each)
            for total, likelihood in zip(totals[1:], likelihoods, strict=True):
                total.add(likelihood if each is None else likelihood * each)
    return torch.tensor([total.end() for totals in sums for total in totals], dtype=torch.float64)
