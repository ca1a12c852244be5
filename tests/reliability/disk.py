"""The operating system as `streamgmm.storage` sees it, failing at one chosen call."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kills import Killed

STEPS = ("open", "write", "fchmod", "fsync", "close", "posix_fadvise", "read", "replace", "unlink")


class FaultyDisk:
    """``os`` with a fault at the ``at``-th of `STEPS`; without one it counts them.

    ``fault`` is the name of an errno, ``short`` (half of a write), ``short then ENOSPC``, or ``kill``.
    """

    def __init__(self, at: int = 0, fault: str = "") -> None:
        self.calls: list[str] = []
        self._at, self._fault = at, fault
        self._dead = self._full = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: Any, **options: Any) -> Any:
            if self._dead:
                raise Killed
            self.calls.append(name)
            if self._full and name == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if len(self.calls) == self._at:
                return self._fail(name, real, arguments)
            return real(*arguments, **options)

        return step

    def _fail(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._fault == "kill":
            self._dead = True
            raise Killed
        if self._fault.startswith("short"):
            if name != "write":
                return real(*arguments)
            self._full = self._fault != "short"
            descriptor, data = arguments
            return real(descriptor, data[: max(1, len(data) // 2)])
        if name == "close":  # which closes whatever it answers
            real(*arguments)
        number = getattr(errno, self._fault)
        raise OSError(number, os.strerror(number))


class PowerCut:
    """``os`` on a disk that keeps only what was flushed, and loses its power behind the ``at``-th of `STEPS`.

    `survivors` are the folders that may be found afterwards: file contents as of their last flush (nothing, where there
    was none), names as of the folder's last flush, or with every later change of names already there.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self._folder, self._at, self._count = folder, at, 0
        self._flushed = {path.stat().st_ino: path.read_bytes() for path in folder.iterdir()}
        self._names = self._now()

    def _now(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self._folder.iterdir()}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: Any, **options: Any) -> Any:
            if self._count >= self._at:
                raise Killed
            self._count += 1
            result = real(*arguments, **options)
            if name == "fsync":
                path = Path(f"/proc/self/fd/{arguments[0]}").resolve()
                if path.is_dir():
                    self._names = self._now()
                else:
                    self._flushed[path.stat().st_ino] = path.read_bytes()
            return result

        return step

    def survivors(self) -> list[dict[str, bytes]]:
        return [
            {name: self._flushed.get(inode, b"") for name, inode in names.items()}
            for names in (self._names, self._now())
        ]
