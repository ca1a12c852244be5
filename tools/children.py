"""Commands run in children of a process that has imported everything: tenths of a second each instead of seconds.

A child can be killed after a time, at a call of one of the package's functions (``at_call``), or at a call of the
storage's (through ``faults.c``, whose environment variables ``environment`` sets). Used by ``kill_harness.py``,
``fuzz.py`` and tests.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a child ended: status as a shell would give it negated for signals, and what it printed."""

    status: int
    stdout: str
    stderr: str
    timed_out: bool

    @property
    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints as the last line."""
        return json.loads(self.stdout.splitlines()[-1])


class Children:
    """The parent of children, in a process of its own; a context."""

    def __enter__(self) -> Children:
        self._folder = Path(tempfile.mkdtemp(prefix="streamgmm-children-"))
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.has_faults = shutil.which("gcc") is not None
        if self.has_faults:
            library = self._folder / "faults.so"
            source = ROOT / "tools" / "faults.c"
            subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
            environment["LD_PRELOAD"] = str(library)
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tools.children"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.stdout.close()
        self._parent.wait()
        shutil.rmtree(self._folder)

    def run(
        self,
        *arguments: object,
        cwd: Path,
        environment: Mapping[str, object] | None = None,
        kill_after: float | None = None,
        signals: tuple[tuple[float, int], ...] = (),
        at_call: tuple[str, int] | None = None,
        number: int = signal.SIGKILL,
        counts: Path | None = None,
        timeout: float = 120.0,
    ) -> Ended:
        """``streamgmm ARGUMENTS`` in ``cwd``.

        ``kill_after`` seconds it gets SIGKILL, ``signals`` are (seconds after the one before, number), ``at_call`` is
        (function, n): the signal ``number`` at its n-th call. The calls of every function of the package are counted
        into ``counts``.
        """
        sent = [*signals, *([] if kill_after is None else [(kill_after, int(signal.SIGKILL))])]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environment": {name: str(value) for name, value in (environment or {}).items()},
            "signals": sent,
            "at_call": at_call,
            "number": int(number),
            "counts": None if counts is None else str(counts),
            "timeout": timeout,
            "stdout": str(self._folder / "stdout"),
            "stderr": str(self._folder / "stderr"),
        }
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        answer = json.loads(self._parent.stdout.readline())
        texts = [(self._folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Ended(answer["status"], *texts, answer["timed_out"])


def _serve() -> None:
    import zarr  # noqa: F401 - what children will need

    from streamgmm.cli.commands import NAMES

    for name in NAMES:
        import_module(f"streamgmm.cli.{name}")

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_child(request)
        print(json.dumps(_wait(child, request)), flush=True)


def _wait(child: int, request: dict[str, Any]) -> dict[str, Any]:
    descriptor = os.pidfd_open(child)
    timed_out = True
    try:
        for seconds, number in [*request["signals"], (request["timeout"], signal.SIGKILL)]:
            ended, _, _ = select.select([descriptor], [], [], seconds)
            if ended:
                timed_out = False
                break
            os.kill(child, number)
            timed_out = seconds == request["timeout"] and number == signal.SIGKILL
            if number == signal.SIGKILL:
                break
        _, status = os.waitpid(child, 0)
    finally:
        os.close(descriptor)
    return {"status": os.waitstatus_to_exitcode(status), "timed_out": timed_out}


def _be_child(request: dict[str, Any]) -> None:
    from streamgmm.cli import main

    status = 99
    try:
        for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0)
        os.chdir(request["cwd"])
        calls = _watch_calls(request)
        os.environ.update(request["environment"])
        try:
            main(request["arguments"])
        except SystemExit as done:
            status = int(done.code or 0)
        if request["counts"] is not None:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            Path(request["counts"]).write_text(json.dumps(calls))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _watch_calls(request: dict[str, Any]) -> Counter[str]:
    """Count calls of the package's functions, and die at one of them, where that was asked for."""
    calls: Counter[str] = Counter()
    if request["at_call"] is None and request["counts"] is None:
        return calls
    wanted, place = request["at_call"] or (None, 0)
    package = str(ROOT / "streamgmm")

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            name = f"{code.co_filename[len(package) + 1 :]}:{code.co_qualname}"
            calls[name] += 1
            if name == wanted and calls[name] == place:
                os.kill(os.getpid(), request["number"])

    threading.setprofile(on_event)
    sys.setprofile(on_event)
    return calls


if __name__ == "__main__":
    _serve()
