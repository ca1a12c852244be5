"""The loop: stream rows past the E-step, keep only additive statistics, update, repeat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from streamgmm.distributed import World, share_of
from streamgmm.errors import PeerLost
from streamgmm.estep import BoundMixture
from streamgmm.feed import Feed, Share
from streamgmm.io.plan import Span
from streamgmm.nonfinite import explain, finite_sums, widened
from streamgmm.passes import steps_of
from streamgmm.precision import bind_checked
from streamgmm.sharing import collect, handed_over, spread
from streamgmm.state import TrainingState
from streamgmm.statistics import SummationTree
from streamgmm.steps.candidate import Candidate
from streamgmm.summing import add_chunk, begin_again, form_to_keep
from streamgmm.task import Training, bound_for
from streamgmm.updating import stepped, updated

_SECONDS_BETWEEN_LOOKS = 0.25


def train(state: TrainingState | None, training: Training, feed: Feed) -> TrainingState:
    """Train until every candidate converged, or a limit is reached.

    ``state`` is the leader's; the other processes of the world bring None, and get what it decides.
    """
    state = spread(_begun(state, training) if state else None, training.world, training.device)
    assert state is not None
    state = _share_out(state, training, feed)
    while state.trees:
        candidates, bound = state.candidates, tuple(bound_for(candidate, state, training) for candidate in state.active)
        feed.keep_as(form_to_keep(bound, training))
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


def _shares(state: TrainingState, n_samples: int, world: World) -> Iterator[Share]:
    """The current step and every one to come, with what this process owns; ends where that is nothing, for good."""
    number, step = state.number, state.step
    while True:
        steps = steps_of(state.course, n_samples, number)
        shares = [share_of(spans, world.rank, world.size) for spans in steps]
        yield from zip(steps[step:], shares[step:], strict=True)
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


def _sum(state: TrainingState, bound: tuple[BoundMixture, ...], training: Training, feed: Feed) -> TrainingState:
    """Add the rows of this process's share of the step: all that are left, unless somebody wants the sums before."""
    observer, world = training.observer, training.world
    unseen, looked = list[Span](), time.monotonic()
    for chunk in feed:
        added = add_chunk(chunk, bound, state, training)
        if added is None:
            segment = chunk.span.segment
            del chunk  # its memory is needed for smaller ones
            state = begin_again(segment, state, training, feed)
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
            if not all(finite_sums(state)):
                explain(state, unseen, training)
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
    if not all(finite_sums(whole)):
        new = _from_the_top(widened(whole, training.settings), n_samples)
    elif whole.trees[0].complete and whole.course.is_stepwise(whole.number):
        new = stepped(whole, training, lead)
    elif whole.trees[0].complete:
        new = updated(whole, training, lead)
    if stop is not None:
        observer.stop(new or whole, stop)
    if new is None:
        observer.checkpoint(whole)
        return None
    return _begun(new, training)
