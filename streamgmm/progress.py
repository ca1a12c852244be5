"""What a person sees while a fit runs."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import NoReturn, TypeAlias

from tqdm import tqdm

from streamgmm.errors import Interrupted
from streamgmm.io.ring import Ring
from streamgmm.io.traffic import bottleneck
from streamgmm.recorder import Progress
from streamgmm.state import TrainingState

Bar: TypeAlias = "tqdm[NoReturn]"

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class TerminalProgress(Progress):
    """A live bar on stderr when that is a terminal, a line an iteration on stdout otherwise, and orderly stops.

    As a context it answers the first of `STOP_SIGNALS` with a checkpoint and an exit; a second SIGINT ends at once.
    The process is then ending, and further signals are ignored: they would only interrupt its last words.

    Of several ``processes`` one tells of all, and hears of the others only when they meet: between meetings it takes
    them to be as fast as itself.
    """

    def __init__(self, *, quiet: bool, processes: int = 1) -> None:
        self._quiet, self._processes = quiet, processes
        self._bar: Bar | None = None
        self._training = False
        self._signal: int | None = None
        self._begun = time.perf_counter()
        self._rate = (self._begun, 0)
        self._known = self._own = self._own_at_meeting = 0

    def stage(self, text: str) -> None:
        self._training = text == "training"
        self._begun = time.perf_counter()
        if self._quiet or self._training:
            return
        self._say(f"{text} …")

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        if not sys.stderr.isatty() or self._quiet:
            return
        bar = self._bar = self._bar or _new_bar(n_samples)
        begun, already = self._rate
        now = time.perf_counter()
        if now - begun > 0.5:
            rate = self._processes * (ring.traffic.bytes_read - already) / (now - begun) / 1e9
            self._rate = (now, ring.traffic.bytes_read)
            bounds = state.best.lower_bounds
            known = f"lower bound {bounds[-1]:.4f}, " if bounds else ""
            limit = bottleneck(ring.traffic, now - self._begun)
            about = "about " if self._processes > 1 else ""
            bar.set_postfix_str(f"{known}{about}{rate:.2f} GB/s, limited by {limit}", refresh=False)
        cursor = self._rows_done(state.rows_summed(n_samples), n_samples, ring.traffic.rows)
        if cursor < bar.n:  # another pass
            bar.reset()
        bar.set_description(f"iteration {state.n_iter + bool(state.trees)}", refresh=False)
        bar.update(cursor - bar.n)

    def _rows_done(self, known: int, n_samples: int, own: int) -> int:
        """Rows of the pass that all processes summed: ``known``, and by guess those since; ``own`` were read here."""
        if known - self._known != own - self._own:  # they met, or another pass began
            self._own_at_meeting = own
        self._known, self._own = known, own
        others = (self._processes - 1) * (own - self._own_at_meeting)
        return min(known + others, n_samples) or n_samples

    def iteration(self, record: dict[str, object]) -> None:
        if self._quiet:
            return
        line = f"iteration {record['iteration']:>4}  {record['n_components']:>5} components"
        line += f"  lower bound {record['lower_bound']:.6f}"
        if record["change"] is not None:
            line += f"  change {record['change']:+.2e}"
        for what in ("empty", "degenerate"):
            components = record[what]
            if isinstance(components, list) and components:
                line += f"  {len(components)} {what} components"
        self._say(f"{line}  {record['seconds']:.1f} s")

    def note(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        tqdm.write(f"streamgmm: warning: {text}", file=sys.stderr)

    def stop_requested(self) -> int | None:
        return self._signal

    def __enter__(self) -> TerminalProgress:
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if self._signal is None else signal.SIG_IGN)
        if self._bar is not None:
            self._bar.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            signal.signal(number, signal.SIG_IGN)
            raise KeyboardInterrupt
        self._signal = number
        if not self._training:
            raise Interrupted(number, f"stopped by {signal.Signals(number).name} before training began")

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _new_bar(n_samples: int) -> Bar:
    return tqdm(total=n_samples, unit=" rows", unit_scale=True, leave=False, dynamic_ncols=True)
