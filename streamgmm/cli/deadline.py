"""An end to every stop: a process that was asked to end does, whatever its threads wait for.

An orderly stop waits for the chunk under way, for reads in flight and for the checkpoint. Storage that hangs, or one
long call into a library, would hold it for ever. Ending at once is safe then: what is on disk is whole at any instant.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import NoReturn

GRACE = {signal.SIGUSR1: 8.0, signal.SIGINT: 25.0, signal.SIGTERM: 25.0, signal.SIGHUP: 25.0}
"""Seconds an orderly stop may take: SIGUSR1 announces ten more, batch systems give 30 between SIGTERM and SIGKILL."""

AT_ONCE = 1.0
"""Seconds after a second SIGINT."""

_CLOSE = b"\0"


class Deadline:
    """A thread that ends the process when a stop takes longer than `GRACE` allows.

    It learns of signals from the interpreter's wake-up descriptor: handlers written in Python wait until the main
    thread returns from the library that it is in.
    """

    def __init__(self) -> None:
        self.told = False
        """Whether the line that says why was printed already."""
        self._stopping = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="streamgmm-deadline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer, unless a stop is under way: joining a thread that hangs is part of it."""
        if self._stopping:
            return
        signal.set_wakeup_fd(self._previous)
        os.write(self._writer, _CLOSE)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _watch(self) -> None:
        number, end = 0, float("inf")
        while True:
            wait = None if end == float("inf") else max(0.0, end - time.monotonic())
            if not select.select([self._reader], [], [], wait)[0]:
                self._end(number)
            for byte in os.read(self._reader, 64):
                if byte == _CLOSE[0]:
                    return
                if byte == signal.SIGINT and self._stopping:
                    end = min(end, time.monotonic() + AT_ONCE)
                elif byte in GRACE and not self._stopping:
                    number, self._stopping = byte, True
                    end = time.monotonic() + GRACE[signal.Signals(byte)]

    def _end(self, number: int) -> NoReturn:
        if not self.told:
            name = signal.Signals(number).name
            line = f"streamgmm: error: stopped by {name} in the middle of work; what was saved before is intact\n"
            # Not print: its lock may belong to a thread that waits.
            os.write(2, line.encode())
        os._exit(128 + number)
