"""What sees a fit while it runs: history, progress, checkpoints by time, and requests to stop."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from math import isfinite
from typing import NoReturn

from streamgmm.checkpoint import History
from streamgmm.errors import Interrupted
from streamgmm.io.ring import Ring
from streamgmm.passes import steps_of
from streamgmm.run import RunFolder
from streamgmm.state import TrainingState, settled
from streamgmm.steps.watch import Look


class Progress:
    """What a fit tells while it runs; this one keeps silent."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        """A chunk was absorbed."""

    def iteration(self, record: dict[str, object]) -> None:
        """A candidate was updated."""

    def note(self, text: str) -> None:
        """What was decided, and why, in a line."""

    def warn(self, text: str) -> None:
        """Something that does not stop the run."""

    def stop_requested(self) -> int | None:
        """The signal that asked the run to stop, or None."""
        return None


class Recorder:
    """Sees the state after every chunk and update: history, progress, checkpoints by time, and signals."""

    def __init__(
        self,
        n_samples: int,
        ring: Ring,
        run: RunFolder | None,
        progress: Progress,
        every: float,
        history: History,
        begun: float,
    ) -> None:
        self._n_samples, self._ring, self._run, self._progress = n_samples, ring, run, progress
        self._checkpoints = run.checkpoints if run else None
        self._every = every
        self._begun = self._last_saved = begun
        self._previous = (time.perf_counter(), ring.traffic.bytes_read, ring.traffic.seconds_waiting)
        self._saved: tuple[int, int, int] | None = None
        self.history = history
        if run is not None:
            run.write_history(history)

    def chunk(self, state: TrainingState) -> None:
        self._progress.chunk(state, self._n_samples, self._ring)

    def wants(self) -> bool:
        return self._due() or self.stop_requested() is not None

    def stop_requested(self) -> int | None:
        return self._progress.stop_requested()

    def warn(self, text: str) -> None:
        self._progress.warn(text)

    def updated(self, state: TrainingState, look: Look | None) -> None:
        self._record(state, look)
        self.checkpoint(state)

    def stepped(self, state: TrainingState) -> None:
        if self._due():
            self.checkpoint(state)

    def checkpoint(self, state: TrainingState) -> None:
        self._hand_over(state)
        self._last_saved = time.perf_counter()

    def rescue(self, state: TrainingState) -> None:
        if self._saved is None or self._done(state)[:2] > self._saved[:2]:
            self.save(state)

    def stop(self, state: TrainingState, number: int) -> NoReturn:
        self.save(state)
        saved = "run the same command again to go on" if self._checkpoints else "nothing was saved without --output"
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}; {saved}")

    def save(self, state: TrainingState) -> None:
        """Checkpoint ``state``; wait until it is durable."""
        self._hand_over(state)
        if self._run is not None and self._checkpoints is not None:
            self._checkpoints.flush()
            # Lines are appended without waiting for the disk; a power cut may have taken some.
            self._run.write_history(self.history)

    def _due(self) -> bool:
        return self._checkpoints is not None and time.perf_counter() - self._last_saved >= self._every

    def _hand_over(self, state: TrainingState) -> None:
        if self._checkpoints is None:
            return
        state = settled(state, self._n_samples)
        done = self._done(state)
        if done != self._saved:
            self._checkpoints.save(state, self.history)
            self._saved = done

    def _done(self, state: TrainingState) -> tuple[int, int, int]:
        """How far ``state`` is: updates, rows of the pass under way, and rows read."""
        return state.n_iter, state.rows_summed(self._n_samples), state.rows_read

    def _record(self, state: TrainingState, look: Look | None) -> None:
        now = (time.perf_counter(), self._ring.traffic.bytes_read, self._ring.traffic.seconds_waiting)
        seconds, streamed, waiting = (after - before for after, before in zip(now, self._previous, strict=True))
        self._previous = now
        for i, candidate in enumerate(state.candidates):
            iteration = candidate.n_iter
            if iteration != state.n_iter:  # converged in an earlier pass
                continue
            bounds = candidate.lower_bounds
            record: dict[str, object] = {
                "candidate": i,
                "n_components": candidate.mixture.n_components,
                "iteration": iteration,
                "lower_bound": bounds[-1],
                "change": bounds[-1] - bounds[-2] if iteration > 1 else None,
                "precision": candidate.precision,
                "converged": candidate.converged,
                "empty": list(candidate.empty),
                "degenerate": list(candidate.degenerate),
                "skipped": state.skipped,
                "n_passes": state.rows_read / self._n_samples,
                "effective_components": candidate.mixture.effective_components,
                "seconds": now[0] - self._begun,
                # Since the update before, or since training began in this process.
                "update_seconds": seconds,
                "update_bytes": streamed,
                "update_waiting": waiting,
                **_of_course(state, self._n_samples, look),
            }
            self.history = (*self.history, record)
            self._progress.iteration(record)
            if self._run is not None:
                self._run.append_history(record)
        if look is not None and look.harmful:
            self._progress.warn(
                f"pass {state.number}: undone, as the likelihood of rows kept out of the sample fell by "
                f"{-look.change:.4f} nats (standard error {look.error:.4f}); going on with full-batch EM"
            )


def _of_course(state: TrainingState, n_samples: int, look: Look | None) -> dict[str, object]:
    """What a record of a stepwise run has besides: how the pass went, and what the rows watched say of it."""
    number, course = state.number - 1, state.course
    if course.algorithm == "em":
        return {}
    # A pass that was undone is not part of the course any more, but it was stepwise.
    stepwise = course.is_stepwise(number) or (look is not None and look.harmful)
    seen = {"watched": look.log_likelihood, "watched_change": look.change, "watched_error": look.error} if look else {}
    return {
        "algorithm": "stepwise" if stepwise else "em",
        "updates": len(steps_of(replace(course, stepwise_passes=number + stepwise), n_samples, number)),
        "shuffled": stepwise and course.shuffled,
        # JSON has no infinity.
        **{name: value if isfinite(value) else None for name, value in seen.items()},
        **({"undone": look.harmful} if look else {}),
    }
