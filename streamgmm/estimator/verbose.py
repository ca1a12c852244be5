"""What ``verbose`` prints: scikit-learn's lines, on stdout."""

from __future__ import annotations

import time

from streamgmm.recorder import Progress


class VerboseProgress(Progress):
    """A line every ``interval`` iterations and one for each start's end; ``verbose`` ≥ 2 adds times and bounds.

    Starts are trained side by side, so where there are several their lines carry the start's number.
    """

    def __init__(self, verbose: int, interval: int, n_starts: int) -> None:
        self._level, self._interval = int(verbose), interval
        self._open = dict.fromkeys(range(n_starts), -float("inf"))
        self._several = n_starts > 1
        self._begun = self._last = time.perf_counter()

    def stage(self, text: str) -> None:
        if text == "training" and self._level:
            for start in self._open:
                print(f"Initialization {start}")
            self._begun = self._last = time.perf_counter()

    def iteration(self, record: dict[str, object]) -> None:
        start, n_iter, bound = record["candidate"], record["iteration"], record["lower_bound"]
        if not self._level or not (isinstance(start, int) and isinstance(n_iter, int) and isinstance(bound, float)):
            return
        change = bound - self._open.get(start, bound)
        self._open[start] = bound
        if n_iter % self._interval == 0:
            line = f"  Iteration {n_iter}" + self._of(start)
            if self._level >= 2:
                now = time.perf_counter()
                line += f"\t time lapse {now - self._last:.5f}s\t ll change {change:.5f}"
                self._last = now
            print(line)
        if record["converged"]:
            self._end(start, "converged")

    def finish(self) -> None:
        """The fit has ended: starts that are still open did not converge."""
        for start in tuple(self._open):
            if self._level:
                self._end(start, "did not converge")

    def _end(self, start: int, outcome: str) -> None:
        bound = self._open.pop(start)
        line = f"Initialization{f' {start}' if self._several else ''} {outcome}."
        if self._level >= 2:
            line += f" time lapse {time.perf_counter() - self._begun:.5f}s\t lower bound {bound:.5f}."
        print(line)

    def _of(self, start: int) -> str:
        return f" of initialization {start}" if self._several else ""
