"""The folder beside the destination in which a preparation grows, and from which it is resumed.

::

    DST.zarr.preparing/
        request.json     what is made of what: must be the same for the work to go on
        journal.jsonl    a line for each finished file: SHA-256, bytes, rows
        staged/  survey…/  runs/  rows/  held-out/  rows.ids/  held-out.ids/
        publish.json     all is done: which folder goes where
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamgmm.errors import RequestError, RunError
from streamgmm.storage import naming, parse_json, read_small, sync_folder, write_atomic

MANIFEST = "manifest.json"

_LAST = ("request.json", "publish.json")

Noted = dict[str, Any]


class Workspace:
    """One preparation's files, held by a lock that the operating system releases when the process ends.

    Raises
    ------
    RunError
        Another process works in it, it was begun with other settings or data, or it cannot be used.
    """

    def __init__(self, destination: Path, *, fresh: bool) -> None:
        self.destination = destination
        self.path = destination.with_name(f"{destination.name}.preparing")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be used ({error.strerror}); name another destination") from None
        self.done: dict[str, Noted] = {}
        self.resumed = False
        try:
            self._take(fresh=fresh)
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self, *, fresh: bool) -> None:
        """Keep others out, finish what was being published, and begin anew where that is wanted."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path}: another process is working in it; wait for it") from None
        if not self._is_ours():
            raise RunError(
                f"{self.path}: holds other files than a preparation's; remove it, or name another destination"
            )
        if (self.path / "publish.json").exists():
            self._move()
        if fresh:
            self.clear()

    def begin(self, identity: Mapping[str, object]) -> None:
        """Take up what was begun, which must be the same, or begin."""
        try:
            there = json.loads(read_small(self.path / "request.json"))
        except FileNotFoundError:
            write_atomic(self.path / "request.json", json.dumps(dict(identity), indent=1, sort_keys=True).encode())
            return
        except ValueError:
            raise RunError(f"{self.path}/request.json: is damaged; start over with --fresh") from None
        refuse_other(self.path, there, identity)
        self._sweep()
        self.done = dict(_journal(self.path / "journal.jsonl"))
        self.resumed = bool(self.done)

    def note(self, name: str, facts: Noted) -> None:
        """Remember that a file is finished, as `journal.jsonl` does."""
        self.done[name] = facts
        path = self.path / "journal.jsonl"
        with naming(path), path.open("a") as file:
            # The line break goes first: it ends a line that a killed process left torn.
            file.write("\n" + json.dumps({"file": name, **facts}))

    def forget(self, name: str) -> None:
        """A finished file turned out not to be what it was; the journal's later line for it will count."""
        self.done.pop(name, None)

    def publish(self, moves: Mapping[str, Path]) -> None:
        """Give each folder its final name, the destination's last, and remove what is left; a kill is made up for."""
        self._sweep()
        plan = json.dumps({name: str(target.absolute()) for name, target in moves.items()})
        write_atomic(self.path / "publish.json", plan.encode())
        self._move()

    def _move(self) -> None:
        plan = parse_json(read_small(self.path / "publish.json"))
        assert isinstance(plan, dict)
        for name, target in plan.items():
            source = self.path / name
            if source.exists():
                with naming(Path(target)):
                    source.rename(target)
        sync_folder(self.destination.absolute().parent)
        self.clear()

    def _is_ours(self) -> bool:
        """Whether the folder is a preparation's, or empty."""
        names = {entry.name for entry in self.path.iterdir()} - {".lock", ".request.json.tmp"}
        return not names or bool(names & set(_LAST))

    def _sweep(self) -> None:
        """Remove what killed processes, or workers, were about to write."""
        for left in list(self.path.rglob("*.tmp")):
            _remove(left)

    def clear(self) -> None:
        """Remove everything but the lock; what says that all is done goes last."""
        others = [entry for entry in self.path.iterdir() if entry.name not in (".lock", *_LAST)]
        for entry in [*others, *(self.path / name for name in _LAST)]:
            _remove(entry)
        self.done = {}

    def close(self) -> None:
        """Let another process have it; an empty one is removed."""
        if {entry.name for entry in self.path.iterdir()} == {".lock"}:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What was prepared in a folder; None where nothing was."""
    try:
        found = parse_json(read_small(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("format") == "streamgmm-prepared" else None


def refuse_other(path: Path, there: Mapping[str, Any], asked: Mapping[str, object]) -> None:
    """Raise RunError where what was begun, or finished, is not what is asked for."""
    asked = json.loads(json.dumps(dict(asked)))
    different = [
        "the source changed"
        if name == "source"
        else f"{name} was {_short(there.get(name))} and is now {_short(asked.get(name))}"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
    if different:
        raise RunError(
            f"{path}: was made differently ({', '.join(different[:4])}); name another destination, or start over with "
            "--fresh"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _journal(path: Path) -> list[tuple[str, Noted]]:
    """The lines that are whole: a killed process leaves at most the last one torn."""
    found: list[tuple[str, Noted]] = []
    if not path.exists():
        return found
    for line in path.read_text(errors="replace").splitlines():
        try:
            facts = json.loads(line)
            found.append((facts.pop("file"), facts))
        except (ValueError, KeyError, AttributeError):
            continue
    return found


def free_name(path: Path) -> Path:
    """``path`` with the first number behind it that is not taken."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def check_room(path: Path, needed: int, told: str) -> None:
    """Raise RequestError where the device has less than ``needed`` bytes left."""
    free = shutil.disk_usage(path).free
    if needed > free:
        raise RequestError(f"{path}: {told} and {free:,} bytes are free; make room, or name another destination")
