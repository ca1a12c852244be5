"""What sees a fit while it runs: history, progress, checkpoints by time, and requests to stop."""

from __future__ import annotations

import signal
import time

from streamgmm.checkpoint import History
from streamgmm.errors import Interrupted
from streamgmm.io.ring import Ring
from streamgmm.run import RunFolder
from streamgmm.training import TrainingState


class Progress:
    """What a fit tells while it runs; this one keeps silent."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        """A chunk was absorbed."""

    def iteration(self, record: dict[str, object]) -> None:
        """A candidate was updated."""

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
        self.history = history
        if run is not None:
            run.write_history(history)

    def __call__(self, state: TrainingState) -> None:
        updated = not state.partials
        if updated:
            self._record(state)
        self._progress.chunk(state, self._n_samples, self._ring)
        stop = self._progress.stop_requested()
        now = time.perf_counter()
        if stop is not None:
            self.save(state)
            saved = "run the same command again to go on" if self._checkpoints else "nothing was saved without --output"
            raise Interrupted(stop, f"stopped by {signal.Signals(stop).name}; {saved}")
        due = updated or now - self._last_saved >= self._every
        if self._checkpoints is not None and due and not state.comparing:
            self._checkpoints.save(state, self.history)
            self._last_saved = now

    def save(self, state: TrainingState) -> None:
        """Checkpoint ``state``, or leave the one before it where rows may have changed; wait until it is durable."""
        if self._checkpoints is not None:
            if not state.comparing:
                self._checkpoints.save(state, self.history)
            self._checkpoints.flush()

    def _record(self, state: TrainingState) -> None:
        for i, candidate in enumerate(state.candidates):
            iteration = candidate.n_iter
            if iteration != state.n_iter:  # converged in an earlier pass
                continue
            bounds = candidate.lower_bounds
            record: dict[str, object] = {
                "candidate": i,
                "iteration": iteration,
                "lower_bound": bounds[-1],
                "change": bounds[-1] - bounds[-2] if iteration > 1 else None,
                "precision": candidate.precision,
                "converged": candidate.converged,
                "empty": list(candidate.empty),
                "degenerate": list(candidate.degenerate),
                "n_passes": state.rows_read / self._n_samples,
                "seconds": time.perf_counter() - self._begun,
            }
            self.history = (*self.history, record)
            self._progress.iteration(record)
            if self._run is not None:
                self._run.append_history(record)
