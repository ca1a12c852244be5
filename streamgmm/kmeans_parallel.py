"""k-means‖: candidates for seeds drawn from every row, many at a time, in a few passes over the stream.

A pass draws ℓ rows with probabilities in proportion to their squared distance to the candidates there are; the last one
counts the rows nearest to each. K centres are then chosen among the candidates as among any weighted rows (Bahmani et
al. 2012, "Scalable k-means++", algorithm 2). Deviations: 1. Exactly ℓ rows are drawn, without replacement, those with
the smallest −ln(u)/(w·d²), where u is a hash of the row's number (Efraimidis & Spirakis 2006): no potential needs to be
known before a pass, and no number of rows is left to chance. 2. The first ℓ come from the sample in memory.

A row's chance depends on its number, its distance and its weight, and counts are sums of integers: how rows are cut
into chunks, and which process reads them, changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.distributed import Message, World, share_of
from streamgmm.errors import NumericalError
from streamgmm.estep import BoundMixture, bind
from streamgmm.frame import Frame, frame_of
from streamgmm.io.intake import Chunk
from streamgmm.io.plan import cut_spans, segment_spans
from streamgmm.io.ring import Ring
from streamgmm.io.sources.base import Source
from streamgmm.mixture import Float64Array
from streamgmm.seeding import Sample, check_finite
from streamgmm.steps.kmeans import squared_distances, with_centres
from streamgmm.weighting import Weighting, uniform_of, without_nonfinite

ROUNDS = 2
"""Passes that draw; one more counts."""

_A_ROUND = 2
"""Rows drawn in each for every component asked for."""

_COUNT_UNIT = 2.0**-20
"""What a weight is rounded to, so that counts are exact whatever the order of rows."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows that stand for all.

    Attributes
    ----------
    rows : (m, D) fp64 array
        In the data's units.
    counts : (m,) fp64 array
        Weight of the rows nearest to each.
    """

    rows: Float64Array
    counts: Float64Array


@dataclass(frozen=True, eq=False)
class Drawn:
    """The ``size`` rows with the smallest keys, row numbers breaking ties; in the order of their numbers.

    Attributes
    ----------
    size : int
    keys : (n,) fp64 array
    numbers : (n,) int64 array
    rows : (n, D) fp64 array
    """

    size: int
    keys: Float64Array
    numbers: NDArray[np.int64]
    rows: Float64Array

    @classmethod
    def nothing(cls, size: int, n_features: int) -> Drawn:
        """Of no rows yet."""
        return cls(size, np.empty(0), np.empty(0, dtype=np.int64), np.empty((0, n_features)))

    @property
    def limit(self) -> float:
        """No row with a larger key will be among them."""
        return float(self.keys.max()) if len(self.keys) == self.size else np.inf

    def merged(self, keys: Float64Array, numbers: NDArray[np.int64], rows: Float64Array) -> Drawn:
        """With other rows among which there are some; a key of infinity is never drawn."""
        keys, numbers = np.concatenate([self.keys, keys]), np.concatenate([self.numbers, numbers])
        rows = np.concatenate([self.rows, rows])
        order = np.lexsort((numbers, keys))
        order = order[np.isfinite(keys[order])][: self.size]
        order = order[np.argsort(numbers[order])]
        return Drawn(self.size, keys[order], numbers[order], rows[order])


@dataclass(frozen=True, eq=False)
class Stream:
    """Every row, for one process of a world: where they come from, what they count, and how they are computed with."""

    source: Source
    ring: Ring
    chunk_rows: int
    weighting: Weighting
    device: torch.device
    precision: str
    workers: int
    world: World

    def chunks(self) -> Iterator[Chunk]:
        """This process's share of one pass."""
        share = share_of(segment_spans(self.source.shape[0]), self.world.rank, self.world.size)
        return self.ring.stream(cut_spans(share, self.chunk_rows))

    def weighted(self, chunk: Chunk, frame: Frame) -> tuple[torch.Tensor, Float64Array]:
        """The chunk's rows (n, D) and what each counts, (n,)."""
        rows, weights = chunk.rows, self.weighting.training(chunk.span.start, chunk.span.stop)
        if self.weighting.skip_nonfinite:
            rows, weights, _ = without_nonfinite(rows, weights, torch.from_numpy(frame.shift))
        return rows, np.ones(len(rows)) if weights is None else weights

    def bound(self, centres: Float64Array, frame: Frame) -> BoundMixture:
        """Centres as the hard mixture with the frame's own variance."""
        mixture = with_centres(centres, float(frame.scale[0] ** -2))
        return bind(mixture, frame, self.precision, self.device, self.workers, hard=True)


def candidates(stream: Stream, n_components: int, seed: int, sample: Sample | None) -> Candidates | None:
    """Candidates for ``n_components`` or fewer, on the leader, from `ROUNDS` + 1 passes; all processes call it.

    Parameters
    ----------
    sample : Sample or None
        The leader's.

    Raises
    ------
    DataError
        A row holds NaN or infinity.
    NumericalError
        Rows are finite and their distances are not.
    """
    size, world = _A_ROUND * n_components, stream.world
    centres, frame = np.empty((0, stream.source.shape[1])), None
    if sample is not None:
        # One scale for all features: distances are in the data's own proportions.
        centres, frame = _from_sample(sample, size, seed), frame_of(sample.rows, "spherical")
    for number in range(1, ROUNDS + 1):
        centres, frame = _shared(centres, frame, stream)
        nothing = Drawn.nothing(size, stream.source.shape[1])
        drawn = _draw(stream, stream.bound(centres, frame), nothing, [seed, number])
        parts = world.gather(_message({"keys": drawn.keys, "numbers": drawn.numbers, "rows": drawn.rows}, stream))
        if world.leads:
            for part in parts[1:]:
                drawn = drawn.merged(*(part.tensors[name].cpu().numpy() for name in ("keys", "numbers", "rows")))
            centres = np.concatenate([centres, drawn.rows])
    centres, frame = _shared(centres, frame, stream)
    counts = _count(stream, stream.bound(centres, frame))
    parts = world.gather(_message({"counts": counts}, stream))
    if not world.leads:
        return None
    total = torch.stack([part.tensors["counts"].cpu() for part in parts]).sum(0).numpy()
    return Candidates(centres[total > 0], total[total > 0] * _COUNT_UNIT)


def n_candidates(n_components: int) -> int:
    """How many there are at most."""
    return 1 + _A_ROUND * n_components * (ROUNDS + 1)


def _from_sample(sample: Sample, size: int, seed: int) -> Float64Array:
    """A row of the sample, and ``size`` others drawn by their squared distance to it."""
    rows = np.asarray(sample.rows, dtype=np.float64)
    weights = np.ones(len(rows)) if sample.weights is None else sample.weights
    d = rows.shape[1]
    first = Drawn.nothing(1, d).merged(_keys(weights, sample.indices, [seed, ROUNDS + 1]), sample.indices, rows).rows
    distances = ((rows - first) ** 2).sum(axis=1)
    others = Drawn.nothing(size, d).merged(_keys(weights * distances, sample.indices, [seed, 0]), sample.indices, rows)
    return np.concatenate([first, others.rows])


def _keys(odds: Float64Array, numbers: NDArray[np.int64], seed: list[int]) -> Float64Array:
    """Exponential keys with rates ``odds`` ≥ 0: infinite for zero."""
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(uniform_of(numbers, seed)) / odds)


def _draw(stream: Stream, bound: BoundMixture, drawn: Drawn, seed: list[int]) -> Drawn:
    """This process's part of one drawing pass."""
    for chunk in stream.chunks():
        rows, weights = stream.weighted(chunk, bound.frame)
        likelihood = bound.log_likelihood(rows).cpu().numpy()
        _check(stream.source, chunk, rows, likelihood)
        numbers = np.arange(chunk.span.start, chunk.span.stop)
        keys = _keys(weights * squared_distances(bound.mixture, likelihood), numbers, seed)
        near = np.flatnonzero(keys <= drawn.limit)
        if len(near):
            chosen = rows[torch.from_numpy(near).to(rows.device)].double().cpu().numpy()
            drawn = drawn.merged(keys[near], numbers[near], chosen)
    return drawn


def _check(source: Source, chunk: Chunk, rows: torch.Tensor, likelihood: Float64Array) -> None:
    bad = np.flatnonzero(~np.isfinite(likelihood))
    if len(bad):
        check_finite(
            source, source.read(chunk.span.start, chunk.span.stop), np.arange(chunk.span.start, chunk.span.stop)
        )
        where = source.locate(chunk.span.start + int(bad[0]))
        raise NumericalError(f"{where}: its distance to the seeds is not finite; scale the data, or use another init")


def _count(stream: Stream, bound: BoundMixture) -> NDArray[np.int64]:
    """Weight of this process's rows nearest to each centre, (m,), in units of `_COUNT_UNIT`."""
    counts = np.zeros(bound.mixture.n_components, dtype=np.int64)
    for chunk in stream.chunks():
        rows, weights = stream.weighted(chunk, bound.frame)
        labels = bound.kernel.top(rows, bound.parameters, 1).labels[:, 0].cpu().numpy()
        np.add.at(counts, labels, np.rint(weights / _COUNT_UNIT).astype(np.int64))
    return counts


def _shared(centres: Float64Array, frame: Frame | None, stream: Stream) -> tuple[Float64Array, Frame]:
    """The leader's, on all processes."""
    sent = _message({"centres": centres, **frame.tensors()}, stream) if stream.world.leads and frame else None
    told = stream.world.broadcast(sent)
    arrays = {name: tensor.cpu().numpy() for name, tensor in told.tensors.items()}
    return arrays["centres"], Frame.from_tensors(arrays)


def _message(arrays: dict[str, np.ndarray], stream: Stream) -> Message:
    # On the device: that is where the fast links are.
    return Message(tensors={name: torch.tensor(array).to(stream.device) for name, array in arrays.items()})
