"""What follows from a step's complete sums."""

from __future__ import annotations

from dataclasses import replace

from streamgmm.mixture import Mixture
from streamgmm.passes import rows_before, steps_of
from streamgmm.state import SoFar, TrainingState
from streamgmm.steps.watch import Look
from streamgmm.task import Lead, Training, bound_for


def updated(state: TrainingState, training: Training, lead: Lead) -> TrainingState:
    """The state after one full-batch update of every active candidate from its complete sums."""
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


def stepped(state: TrainingState, training: Training, lead: Lead) -> TrainingState:
    """The state after one update within a pass; at its end the pass is judged, and undone where it did harm."""
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
    return lead.watch.look(bound_for(old, after, training), bound_for(new, after, training), undoable)
