"""The loop: stream rows past the E-step, keep only additive statistics, update, repeat."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from streamgmm.distributed import ALONE, World, share_of
from streamgmm.errors import DataError, NumericalError, PeerLost, StreamGMMError
from streamgmm.estep import BoundMixture, bind, e_step
from streamgmm.feed import Feed
from streamgmm.io.integrity import UNIT_BYTES, UNIT_ROWS, fold
from streamgmm.io.plan import Span
from streamgmm.io.ring import Chunk
from streamgmm.io.sources.base import Source
from streamgmm.mixture import Mixture
from streamgmm.passes import regions, rows_before, steps_of
from streamgmm.precision import bind_checked, next_precision
from streamgmm.seeding import check_finite
from streamgmm.sharing import collect, handed_over, spread
from streamgmm.state import OpenSegment, SoFar, TrainingState
from streamgmm.statistics import SummationTree
from streamgmm.steps.candidate import Candidate, Step
from streamgmm.steps.stepwise import StepwiseStep
from streamgmm.steps.watch import Look, Watch
from streamgmm.weighting import Weighting, without_nonfinite

_RESCAN_ROWS = 16_384
_SECONDS_BETWEEN_LOOKS = 0.25


@dataclass(frozen=True, eq=False)
class TrainingSettings:
    """When to stop, and how to compute.

    Attributes
    ----------
    weighting : Weighting
        What each row counts.
    max_iter : int
        Full-batch updates, and stepwise passes.
    max_passes : float
        Rows read over rows there are, everything counted.
    precision : str
        ``auto`` or one of ``kernels.PRECISIONS``.
    workers : int
        Compute threads on a CPU; they change no bit.
    hard : bool
        Each row belongs to its most likely component alone, as in k-means.
    """

    weighting: Weighting
    max_iter: int
    max_passes: float
    precision: str
    workers: int
    hard: bool = False


class Observer(Protocol):
    """What sees a process train, and may end it."""

    def chunk(self, state: TrainingState) -> None:
        """A chunk was added."""
        ...

    def wants(self) -> bool:
        """Whether the sums so far are to be saved, or the run is to stop."""
        ...

    def stop_requested(self) -> int | None:
        """The signal that asked for it, or None."""
        ...

    def warn(self, text: str) -> None:
        """Something that does not stop the run."""
        ...

    def updated(self, state: TrainingState, look: Look | None) -> None:
        """A pass ended and every active candidate was updated; the leader's alone, as what follows.

        ``look`` is what became of the rows that are watched, if any are.
        """
        ...

    def stepped(self, state: TrainingState) -> None:
        """An update was made within a pass."""
        ...

    def checkpoint(self, state: TrainingState) -> None:
        """Save ``state``, the sums of all processes."""
        ...

    def rescue(self, state: TrainingState) -> None:
        """Save ``state``, what is left of them, where it is more than was saved before."""
        ...

    def stop(self, state: TrainingState, number: int) -> NoReturn:
        """Save ``state`` and raise Interrupted."""
        ...


@dataclass(frozen=True, eq=False)
class Lead:
    """What only the leader needs.

    Attributes
    ----------
    step : Step
        What one full-batch update is.
    check_rows : (n, D) tensor
        Rows, on the device, on which precisions are checked.
    stepwise : StepwiseStep or None
        What one update within a pass is; None where there are none.
    watch : Watch or None
        Rows on which every pass is judged.
    bound : dict
        What was bound to check a precision, by mixture, until the pass takes it.
    """

    step: Step
    check_rows: Tensor
    stepwise: StepwiseStep | None = None
    watch: Watch | None = None
    bound: dict[Mixture, BoundMixture] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Training:
    """What does not change while a state is trained; ``lead`` is the leader's."""

    source: Source
    settings: TrainingSettings
    device: torch.device
    observer: Observer
    world: World = ALONE
    lead: Lead | None = None


def train(state: TrainingState | None, training: Training, feed: Feed) -> TrainingState:
    """Train until every candidate converged, or a limit is reached.

    ``state`` is the leader's; the other processes of the world bring None, and get what it decides.
    """
    state = spread(_begun(state, training) if state else None, training.world, training.device)
    assert state is not None
    state = _share_out(state, training, feed)
    while state.trees:
        candidates, bound = state.candidates, tuple(_bind(candidate, state, training) for candidate in state.active)
        while state.candidates is candidates:
            state = _sum(state, bound, training, feed)
            state = _confer(state, training, feed)
    return state


def _begun(state: TrainingState, training: Training) -> TrainingState:
    """The state at the beginning of its next step, if there is one; of a pass, in precisions that were checked."""
    n_samples, settings, lead = training.source.shape[0], training.settings, training.lead
    if state.trees:
        return state
    if state.step > 0:
        return _from_the_top(state, n_samples)
    affordable = state.rows_read + n_samples <= settings.max_passes * n_samples
    if not (state.active and state.n_iter < settings.max_iter and affordable):
        return state
    assert lead is not None

    def checked(candidate: Candidate) -> Candidate:
        if candidate.converged or settings.precision != "auto":
            return candidate
        mixture, precision = candidate.mixture, candidate.precision
        bound = bind_checked(mixture, state.frame, precision, lead.check_rows, settings.workers, settings.hard)
        lead.bound[mixture] = bound
        return replace(candidate, precision=bound.precision)

    lead.bound.clear()
    undoable = state.candidates[0].mixture if state.course.is_stepwise(state.number) else None
    candidates = tuple(checked(candidate) for candidate in state.candidates)
    return replace(_from_the_top(replace(state, candidates=candidates), n_samples), before=undoable)


def _from_the_top(state: TrainingState, n_samples: int) -> TrainingState:
    """The state with nothing summed yet of its step."""
    segments = [span.segment for span in state.spans(n_samples)]
    return replace(state, trees=tuple(SummationTree.of(segments) for _ in state.active), opened=(), skipped=0)


def _share_out(state: TrainingState, training: Training, feed: Feed) -> TrainingState:
    """What this process has to do, in the feed; the state without the segments that others have begun."""
    if not state.trees:
        return state
    world, n_samples = training.world, training.source.shape[0]
    cursors = {opened.segment: opened.cursor for opened in state.opened}
    left = [
        replace(span, start=cursors.get(span.segment, span.start))
        for span in state.spans(n_samples)
        if span.segment not in state.finished
    ]
    share = share_of(left, world.rank, world.size)
    feed.begin(share, _shares(state, n_samples, world), _rows_to_check(state, share, n_samples, world))
    own = {span.segment for span in share}
    state = replace(state, opened=tuple(opened for opened in state.opened if opened.segment in own))
    return state if world.leads else handed_over(state)


def _shares(state: TrainingState, n_samples: int, world: World) -> Iterator[list[Span]]:
    """What this process owns of the current step and of every one to come; ends where that is nothing, for good."""
    number, step = state.number, state.step
    while True:
        shares = [share_of(spans, world.rank, world.size) for spans in steps_of(state.course, n_samples, number)]
        yield from shares[step:]
        if not state.course.is_stepwise(number) and not any(shares):
            return
        number, step = number + 1, 0


def _rows_to_check(state: TrainingState, left: list[Span], n_samples: int, world: World) -> int:
    """As many of this process's rows as hold all of them once: no run goes on with data that changed while it stopped.

    What is ``left`` of this step and of this pass, and the next pass where some of this one is summed already.
    """

    def own(number: int, first: int) -> int:
        steps = steps_of(state.course, n_samples, number)[first:]
        return sum(span.rows for spans in steps for span in share_of(spans, world.rank, world.size))

    rest = sum(span.rows for span in left) + own(state.number, state.step + 1)
    return rest if state.rows_summed(n_samples) == 0 else rest + own(state.number + 1, 0)


def _bind(candidate: Candidate, state: TrainingState, training: Training) -> BoundMixture:
    known = training.lead.bound.pop(candidate.mixture, None) if training.lead else None
    if known is not None and known.precision == candidate.precision:
        return known
    settings = training.settings
    return bind(candidate.mixture, state.frame, candidate.precision, training.device, settings.workers, settings.hard)


def _sum(state: TrainingState, bound: tuple[BoundMixture, ...], training: Training, feed: Feed) -> TrainingState:
    """Add the rows of this process's share of the step: all that are left, unless somebody wants the sums before."""
    observer, world = training.observer, training.world
    unseen, looked = list[Span](), time.monotonic()
    for chunk in feed:
        added = _add(chunk, bound, state, training)
        if added is None:
            state = _shrink(chunk.span.segment, state, training, feed)
            continue
        state = added
        unseen.append(chunk.span)
        observer.chunk(state)
        meeting = world.called()
        if observer.wants():
            world.call()
            meeting = True
        # Looking waits for the device; when that happens changes no result: the pass begins again, or ends.
        if meeting or feed.exhausted or time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
            if not all(_finite_sums(state)):
                _explain(state, unseen, training)
                world.call()
                meeting = True
            unseen, looked = [], time.monotonic()
        if meeting:
            break
    return state


def _confer(state: TrainingState, training: Training, feed: Feed) -> TrainingState:
    """Bring the sums of all processes together on the leader, and go on as it decides."""
    world, observer, device = training.world, training.observer, training.device

    def idle() -> None:
        if observer.wants():
            world.call()

    decided = None
    try:
        collected = collect(state, observer.stop_requested(), world, device, idle)
    except PeerLost:
        if world.leads:
            observer.rescue(state)
        raise
    if collected is not None:
        whole, stop = collected
        decided = _decide(whole, stop, training)
        state = replace(whole, opened=state.opened)
    decided = spread(decided, world, device)
    if decided is None:
        return state if world.leads else handed_over(state)
    if feed.exhausted and _follows(decided, state, training.source.shape[0]):
        feed.next_step()
        return decided if world.leads else handed_over(decided)
    return _share_out(decided, training, feed)


def _follows(decided: TrainingState, state: TrainingState, n_samples: int) -> bool:
    """Whether the step of ``decided`` is the one that comes after that of ``state``."""
    last = state.step + 1 == len(steps_of(state.course, n_samples, state.number))
    following = (state.number + 1, 0) if last else (state.number, state.step + 1)
    return decided.course == state.course and (decided.number, decided.step) == following


def _decide(whole: TrainingState, stop: int | None, training: Training) -> TrainingState | None:
    """What follows from the sums of all processes; None where it is to go on with the pass."""
    n_samples, observer, lead = training.source.shape[0], training.observer, training.lead
    assert lead is not None
    new = None
    if not all(_finite_sums(whole)):
        new = _from_the_top(_widened(whole, training.settings), n_samples)
    elif whole.trees[0].complete and whole.course.is_stepwise(whole.number):
        new = _stepped(whole, training, lead)
    elif whole.trees[0].complete:
        new = _updated(whole, training, lead)
    if stop is not None:
        observer.stop(new or whole, stop)
    if new is None:
        observer.checkpoint(whole)
        return None
    return _begun(new, training)


def _add(
    chunk: Chunk, bound: tuple[BoundMixture, ...], state: TrainingState, training: Training
) -> TrainingState | None:
    """The state with the chunk's rows added to its segment, in place; None where device memory did not suffice."""
    span, weighting = chunk.span, training.settings.weighting
    opened = next((opened for opened in state.opened if opened.segment == span.segment), None)
    try:
        opened = opened or OpenSegment(span.segment, span.start, tuple(each.empty_statistics() for each in bound))
        rows, skipped, given = chunk.rows, 0, weighting.training(span.start, span.stop)
        if weighting.skip_nonfinite:
            rows, given, skipped = without_nonfinite(rows, given, torch.from_numpy(state.frame.shift))
        weights = None if given is None else torch.from_numpy(given).to(rows.device)
        for mixture, sums in zip(bound, opened.sums, strict=True):
            e_step(rows, mixture, sums, weights)
        state, checksum, comparing = _checked(state, span, opened.checksum, chunk.units, training.source)
        skipped += opened.skipped
        opened = replace(opened, cursor=span.stop, checksum=checksum, skipped=skipped, comparing=comparing)
        others = (other for other in state.opened if other.segment != span.segment)
        state = replace(state, opened=(*others, opened), rows_read=state.rows_read + span.rows)
        return _close(opened, bound, state, training.source.shape[0])
    except torch.OutOfMemoryError:
        return None


def _shrink(segment: int, state: TrainingState, training: Training, feed: Feed) -> TrainingState:
    """Begin a segment again, whose sums may be halfway between two chunks, with smaller chunks.

    Raises
    ------
    StreamGMMError
        They are as small as can be.
    """
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    if not feed.shrink(segment):
        active = ", ".join(f"{c.mixture.n_components} {c.mixture.covariance_type}" for c in state.active)
        raise StreamGMMError(
            f"out of device memory even with chunks of {feed.chunk_rows} rows, for {active} components of "
            f"{training.source.shape[1]} features; use fewer, or a device that is free, and run the same command again"
        )
    training.observer.warn(f"out of device memory: going on with chunks of {feed.chunk_rows} rows; no result changes")
    return replace(state, opened=tuple(opened for opened in state.opened if opened.segment != segment))


def _close(opened: OpenSegment, bound: tuple[BoundMixture, ...], state: TrainingState, n_samples: int) -> TrainingState:
    """Place the segment in the trees if it is whole."""
    if opened.cursor != next(span.stop for span in state.spans(n_samples) if span.segment == opened.segment):
        return state
    trees = (
        tree.place(opened.segment, mixture.finish(sums))
        for tree, mixture, sums in zip(state.trees, bound, opened.sums, strict=True)
    )
    return replace(
        state,
        trees=tuple(trees),
        opened=tuple(other for other in state.opened if other is not opened),
        skipped=state.skipped + opened.skipped,
    )


def _checked(
    state: TrainingState, span: Span, checksum: int | None, units: bytes | None, source: Source
) -> tuple[TrainingState, int | None, bool]:
    """The state with the checksum of every region that ends in ``span`` noted, or compared with the one noted before.

    ``checksum`` is of the rows of the first region that lie before the span, and is given back for the last one, with
    whether it is still to be compared.

    Raises
    ------
    DataError
        The rows of a region are not those of the first pass.
    """
    if units is None:
        return state, None, False
    parts, known = regions(state.course, source.shape[0]), dict(state.checksums)
    place, comparing = bisect_right(parts, span.start, key=lambda part: part[0]) - 1, False
    row = span.start
    while row < span.stop:
        first, last = parts[place]
        stop = min(last, span.stop)
        checksum = 0 if row == first else checksum
        if checksum is not None:
            here, there = (-(-(end - span.start) // UNIT_ROWS) * UNIT_BYTES for end in (row, stop))
            checksum, comparing = fold(checksum, units[here:there]), place in known and stop < last
        if stop == last and checksum is not None and known.setdefault(place, checksum) != checksum:
            raise DataError(
                f"{source.name}: changed since the first pass, between {source.locate(first)} and "
                f"{source.locate(last - 1)}; restore it, or start over with --fresh"
            )
        row, place = stop, place + 1
    if len(known) > len(state.checksums):
        state = replace(state, checksums=tuple(known.items()))
    return state, checksum, comparing


def _finite_sums(state: TrainingState) -> list[bool]:
    """Whether the likelihood of every row so far is a number, for each active candidate; a row that is not finite, or
    overflows, makes it none."""

    def finite(i: int, tree: SummationTree) -> bool:
        sums = [*(node for _, node in tree.nodes if node is not None), *(opened.sums[i] for opened in state.opened)]
        return math.isfinite(sum(float(each.log_likelihood) for each in sums))

    return [finite(i, tree) for i, tree in enumerate(state.trees)]


def _explain(state: TrainingState, spans: list[Span], training: Training) -> None:
    """Return where a wider precision can be the remedy for sums that are not finite.

    Raises
    ------
    DataError
        The rows of ``spans`` hold NaN or infinity.
    NumericalError
        They are finite, and no wider precision is allowed.
    """
    source = training.source
    for span in spans if not training.settings.weighting.skip_nonfinite else ():
        for start in range(span.start, span.stop, _RESCAN_ROWS):
            stop = min(start + _RESCAN_ROWS, span.stop)
            check_finite(source, source.read(start, stop), np.arange(start, stop))
    _widened(state, training.settings)


def _widened(state: TrainingState, settings: TrainingSettings) -> TrainingState:
    """The next precision for each candidate whose sums are not finite. Raises NumericalError where there is none."""

    def widened(candidate: Candidate) -> Candidate:
        wider = next_precision(candidate.precision) if settings.precision == "auto" else None
        if wider is None:
            raise NumericalError(
                f"the likelihood of the data is not finite in precision {candidate.precision!r}; "
                "use precision='auto', or scale the data"
            )
        return replace(candidate, precision=wider)

    finite = iter(_finite_sums(state))
    return replace(state, candidates=tuple(c if c.converged or next(finite) else widened(c) for c in state.candidates))


def _updated(state: TrainingState, training: Training, lead: Lead) -> TrainingState:
    """One full-batch update of every active candidate from its complete sums."""
    trees = iter(state.trees)
    candidates = tuple(
        candidate if candidate.converged else lead.step(candidate, state.frame.restore(next(trees).total()))
        for candidate in state.candidates
    )
    # The bound before was not of one mixture: it says nothing about how much this update changed.
    if state.number == state.course.stepwise_passes > 0:
        candidates = tuple(replace(candidate, converged=False) for candidate in candidates)
    new = replace(state, candidates=candidates, trees=(), opened=(), number=state.number + 1)
    training.observer.updated(new, _look(state.candidates[0].mixture, new, training, lead))
    return new


def _stepped(state: TrainingState, training: Training, lead: Lead) -> TrainingState:
    """One update within a pass; at its end the pass is judged, and undone where it did harm."""
    assert lead.stepwise is not None
    (candidate,), course, n_samples = state.candidates, state.course, training.source.shape[0]
    sums = state.frame.restore(state.trees[0].total()).to("cpu")
    seen = state.number * n_samples + rows_before(course, n_samples, state.number, state.step)
    candidate = lead.stepwise(candidate, sums, seen)
    so_far = SoFar(
        state.so_far.log_likelihood + float(sums.log_likelihood),
        state.so_far.n_rows + float(sums.n_rows),
        state.so_far.skipped + state.skipped,
    )
    state = replace(state, candidates=(candidate,), trees=(), opened=(), step=state.step + 1, so_far=so_far)
    if state.step < len(steps_of(course, n_samples, state.number)):
        training.observer.stepped(state)
        return state
    assert state.before is not None
    new = replace(
        state,
        candidates=(lead.stepwise.ended(candidate, so_far.log_likelihood, so_far.n_rows),),
        number=state.number + 1,
        step=0,
        before=None,
        so_far=SoFar(),
        skipped=so_far.skipped,
    )
    look = _look(state.before, new, training, lead)
    if look is not None and look.harmful:
        undone = replace(new.candidates[0], mixture=state.before)
        new = replace(new, candidates=(undone,), course=replace(course, stepwise_passes=new.number))
    training.observer.updated(new, look)
    return new


def _look(before: Mixture, after: TrainingState, training: Training, lead: Lead) -> Look | None:
    """What the last pass did to the rows that are watched."""
    if lead.watch is None:
        return None
    new = after.candidates[0]
    old = replace(new, mixture=before)
    undoable = after.course.is_stepwise(after.number - 1)
    return lead.watch.look(_bind(old, after, training), _bind(new, after, training), undoable)
