"""What stands for SIGKILL within a process."""

from __future__ import annotations

from streamgmm.io.ring import Ring
from streamgmm.recorder import Progress
from streamgmm.state import TrainingState


class Killed(BaseException):
    """Nothing may catch it, and nothing the process does afterwards counts."""


class KilledAt(Progress):
    """Ends the run after a number of chunks, between the checkpoint before it and anything after."""

    def __init__(self, chunks: int) -> None:
        self._left = chunks

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        if self._left == 0:
            raise Killed
        self._left -= 1
