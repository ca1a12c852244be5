"""What ``verbose`` prints of k-means: scikit-learn's lines, on stdout."""

from __future__ import annotations

from streamgmm.io.ring import Ring
from streamgmm.mixture import Mixture
from streamgmm.recorder import Progress
from streamgmm.state import TrainingState
from streamgmm.steps.kmeans import inertia


class LloydProgress(Progress):
    """The inertia of every iteration, counted from 0, and how each start ended.

    ``n_rows`` is the weight of all rows, ``tol`` what is told of a start that ended by it.
    """

    def __init__(self, n_starts: int, n_rows: float, tol: float) -> None:
        self._n_starts, self._n_rows = n_starts, n_rows
        self._ending = "strict convergence" if tol == 0 else f"center shift within tolerance {tol}"
        self._models: tuple[Mixture, ...] = ()

    def stage(self, text: str) -> None:
        if text == "training":
            print("\n".join(["Initialization complete"] * self._n_starts))

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        self._models = tuple(candidate.mixture for candidate in state.candidates)

    def iteration(self, record: dict[str, object]) -> None:
        start, n_iter, bound = record["candidate"], record["iteration"], record["lower_bound"]
        if not (isinstance(start, int) and isinstance(n_iter, int) and isinstance(bound, float)):
            return
        if not self._models:  # a resumed pass that had no row left
            return
        of = f" of initialization {start}" if self._n_starts > 1 else ""
        print(f"Iteration {n_iter - 1}{of}, inertia {inertia(self._models[start], bound) * self._n_rows}.")
        if record["converged"]:
            print(f"Converged at iteration {n_iter - 1}{of}: {self._ending}.")
