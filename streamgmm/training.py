"""The loop: stream rows past the E-step, keep only additive statistics, update, repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import chain, cycle

import numpy as np
import torch
from torch import Tensor

from streamgmm.errors import DataError, NumericalError
from streamgmm.estep import BoundMixture, bind, e_step
from streamgmm.frame import Frame
from streamgmm.io.integrity import fold
from streamgmm.io.plan import Span, plan_chunks
from streamgmm.io.ring import Chunk, Ring
from streamgmm.io.sources.base import Source
from streamgmm.precision import choose_precision, next_precision
from streamgmm.seeding import check_finite
from streamgmm.statistics import Statistics, SummationTree, segment_bounds
from streamgmm.steps.em import Candidate, StepSettings, em_step

_RESCAN_ROWS = 16_384
_SECONDS_BETWEEN_LOOKS = 0.25


@dataclass(frozen=True, eq=False)
class PartialPass:
    """One candidate's sums over the rows before the cursor: the tree's open nodes and the segment under way."""

    tree: SummationTree
    segment: Statistics


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything a run needs to go on; a checkpoint is this record.

    Attributes
    ----------
    candidates : tuple of Candidate
        Models trained on the same passes; one is the usual case.
    frame : Frame
    cursor : int
        Rows of the current pass already in ``partials``; 0 between passes.
    partials : tuple of PartialPass
        One for each candidate that is not converged; empty between passes.
    rows_read : int
        Since the beginning of the run, sampling and seeding included.
    checksums : tuple of (segment, checksum)
        Of the data in the first pass that finished the segment; later data must match.
    open_checksum : int or None
        Of the open segment up to the cursor; None where its rows were not checked.
    comparing : bool
        Whether the open segment is being compared with an earlier pass. Until it ends, its rows may turn out to have
        changed, so such a state is not to be saved.
    """

    candidates: tuple[Candidate, ...]
    frame: Frame
    cursor: int = 0
    partials: tuple[PartialPass, ...] = ()
    rows_read: int = 0
    checksums: tuple[tuple[int, int], ...] = ()
    open_checksum: int | None = 0
    comparing: bool = False

    @property
    def active(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if not candidate.converged)

    @property
    def n_iter(self) -> int:
        return max(candidate.n_iter for candidate in self.candidates)

    @property
    def best(self) -> Candidate:
        """The candidate with the greatest lower bound; the first, before any has one."""
        return max(self.candidates, key=lambda candidate: candidate.lower_bounds[-1:] or (-math.inf,))


@dataclass(frozen=True)
class TrainingSettings:
    """When to stop, and how to compute.

    Attributes
    ----------
    step : StepSettings
    max_iter : int
        Parameter updates.
    max_passes : float
        Rows read over rows there are, everything counted.
    precision : str
        ``auto`` or one of ``kernels.PRECISIONS``.
    workers : int
        Compute threads on a CPU; they change no bit.
    """

    step: StepSettings
    max_iter: int
    max_passes: float
    precision: str
    workers: int


Observer = Callable[[TrainingState], None]


def train(
    state: TrainingState,
    source: Source,
    ring: Ring,
    chunk_rows: int,
    check_rows: Tensor,
    settings: TrainingSettings,
    observe: Observer,
) -> TrainingState:
    """Train until every candidate converged, or a limit is reached.

    ``observe`` sees the state after every chunk and after every update, and may raise to stop the run.
    """
    n_samples = source.shape[0]
    stream = _endless(ring, n_samples, chunk_rows, state.cursor)
    try:
        while _goes_on(state, n_samples, settings):
            if not state.partials:
                state = _begin_pass(state, check_rows, settings)
            bound = tuple(_bind(c, state.frame, check_rows.device, settings) for c in state.active)
            finite_to, looked = 0, time.monotonic()
            for chunk in stream:
                state = _close_segment(chunk, bound, _absorb(chunk, bound, state), source)
                # Looking waits for the device; when that happens changes no result: the pass begins again, or ends.
                if state.cursor == n_samples or time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                    if not all(map(_is_finite, state.partials)):
                        stream.close()
                        state = _widen(state, source, finite_to, settings)
                        stream = _endless(ring, n_samples, chunk_rows, 0)
                        break
                    finite_to, looked = state.cursor, time.monotonic()
                if state.cursor == n_samples:
                    state = _update(state, settings)
                observe(state)
                if not state.partials:
                    break
    finally:
        stream.close()
    return state


def _endless(ring: Ring, n_samples: int, chunk_rows: int, cursor: int) -> Generator[Chunk]:
    """This pass from the cursor on, then pass after pass: reading goes on while the parameters are updated.

    Every row is checked once in a process, so that a run never goes on with data that changed while it was stopped.
    """
    this_pass = plan_chunks(n_samples, chunk_rows, cursor)
    checked = n_samples if cursor == 0 else 2 * n_samples - cursor
    return ring.stream(chain(this_pass, cycle(plan_chunks(n_samples, chunk_rows))), checked)


def _goes_on(state: TrainingState, n_samples: int, settings: TrainingSettings) -> bool:
    if state.partials:
        return True
    affordable = state.rows_read + n_samples <= settings.max_passes * n_samples
    return bool(state.active) and state.n_iter < settings.max_iter and affordable


def _begin_pass(state: TrainingState, check_rows: Tensor, settings: TrainingSettings) -> TrainingState:
    """Zero sums for each active candidate, in a precision that was checked at its parameters."""

    def checked(candidate: Candidate) -> Candidate:
        if candidate.converged or settings.precision != "auto":
            return candidate
        mixture, precision = candidate.mixture, candidate.precision
        chosen = choose_precision(mixture, state.frame, precision, check_rows, settings.workers)
        return replace(candidate, precision=chosen)

    state = replace(state, candidates=tuple(checked(candidate) for candidate in state.candidates))
    return replace(state, cursor=0, partials=_no_sums(state, check_rows.device))


def _no_sums(state: TrainingState, device: torch.device) -> tuple[PartialPass, ...]:
    origin = torch.zeros(len(state.frame.shift), dtype=torch.float64)
    shapes = ((c.mixture.covariance_type, c.mixture.n_components) for c in state.active)
    return tuple(PartialPass(SummationTree(), Statistics.zeros(kind, k, origin, device)) for kind, k in shapes)


def _bind(candidate: Candidate, frame: Frame, device: torch.device, settings: TrainingSettings) -> BoundMixture:
    return bind(candidate.mixture, frame, candidate.precision, device, settings.workers)


def _absorb(chunk: Chunk, bound: tuple[BoundMixture, ...], state: TrainingState) -> TrainingState:
    """Add the chunk's rows to every candidate's open segment, in place."""
    for mixture, partial in zip(bound, state.partials, strict=True):
        e_step(chunk.rows, mixture, partial.segment)
    known = state.open_checksum is not None and chunk.units is not None
    return replace(
        state,
        cursor=chunk.span.stop,
        rows_read=state.rows_read + chunk.span.rows,
        open_checksum=fold(state.open_checksum or 0, chunk.units or b"") if known else None,
        comparing=known and chunk.span.segment in dict(state.checksums),
    )


def _ends_segment(span: Span, n_samples: int) -> bool:
    return span.stop == segment_bounds(n_samples)[span.segment][1]


def _is_finite(partial: PartialPass) -> bool:
    """Whether the likelihood of every row so far is a number; rows that are not finite, or overflow, make it none."""
    sums = (partial.segment, *(node for _, node in partial.tree.nodes if node is not None))
    return math.isfinite(sum(float(statistics.log_likelihood) for statistics in sums))


def _close_segment(
    chunk: Chunk, bound: tuple[BoundMixture, ...], state: TrainingState, source: Source
) -> TrainingState:
    """Place the open segment in the tree when the chunk ends it and its rows are those of the first pass.

    Raises
    ------
    DataError
        They are not.
    """
    if not _ends_segment(chunk.span, source.shape[0]):
        return state
    partials = (
        PartialPass(partial.tree.place(chunk.span.segment, mixture.finish(partial.segment)), mixture.empty_statistics())
        for mixture, partial in zip(bound, state.partials, strict=True)
    )
    return replace(_checked(state, source, chunk.span.segment), partials=tuple(partials), open_checksum=0)


def _checked(state: TrainingState, source: Source, segment: int) -> TrainingState:
    """The state with the segment's checksum noted, or compared with the one noted before."""
    known = dict(state.checksums)
    if state.open_checksum is None or known.get(segment) == state.open_checksum:
        return replace(state, comparing=False)
    if segment in known:
        first, last = segment_bounds(source.shape[0])[segment]
        raise DataError(
            f"{source.name}: changed since the first pass, between {source.locate(first)} and "
            f"{source.locate(last - 1)}; restore it, or start over with --fresh"
        )
    return replace(state, checksums=(*state.checksums, (segment, state.open_checksum)))


def _widen(state: TrainingState, source: Source, first: int, settings: TrainingSettings) -> TrainingState:
    """Begin the pass again in the next precision, unless the rows from ``first`` to the cursor are not finite.

    Raises
    ------
    DataError
        They hold NaN or infinity.
    NumericalError
        They are finite, and no wider precision is allowed.
    """
    last = state.cursor
    for start in range(first, last, _RESCAN_ROWS):
        stop = min(start + _RESCAN_ROWS, last)
        check_finite(source, source.read(start, stop), np.arange(start, stop))

    def widened(candidate: Candidate, partial: PartialPass) -> Candidate:
        if _is_finite(partial):
            return candidate
        wider = next_precision(candidate.precision) if settings.precision == "auto" else None
        if wider is None:
            raise NumericalError(
                f"the likelihood of rows {first} to {last} is not finite in precision {candidate.precision!r}; "
                "use precision='auto', or scale the data"
            )
        return replace(candidate, precision=wider)

    device = state.partials[0].segment.sums.device
    partials = iter(state.partials)
    candidates = tuple(c if c.converged else widened(c, next(partials)) for c in state.candidates)
    return replace(state, candidates=candidates, cursor=0, partials=_no_sums(state, device), open_checksum=0)


def _update(state: TrainingState, settings: TrainingSettings) -> TrainingState:
    """One update of every active candidate from its complete sums."""
    partials = iter(state.partials)
    candidates = tuple(
        candidate
        if candidate.converged
        else em_step(candidate, state.frame.restore(next(partials).tree.total()), settings.step)
        for candidate in state.candidates
    )
    return replace(state, candidates=candidates, cursor=0, partials=())
