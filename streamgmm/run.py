"""The RUN folder: ``config.json``, ``history.jsonl``, ``checkpoints/``, and at the end ``model.safetensors``."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

from streamgmm.checkpoint import Checkpoints, History
from streamgmm.errors import DamagedFileError, RunError
from streamgmm.mixture import Mixture, load_model
from streamgmm.storage import write_atomic

_EXTENDABLE = ("max_iter", "max_passes")
"""Settings that may grow between calls: they say when to stop, not what to compute."""


class RunFolder:
    """One run's files, held by a lock that the operating system releases when the process ends, however it ends.

    Parameters
    ----------
    path : Path
        Created if it is missing. A folder that holds anything else than a run is refused.
    fresh : bool
        Move a run that is there aside, to ``RUN.1``, ``RUN.2``, …, and start over.

    Raises
    ------
    RunError
        Another process works in the folder, or it is not a run, or it cannot be written.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        try:
            if fresh and self._is_run():
                with self._locked():
                    path.rename(_free_name(path))
            if path.exists() and not self._is_run() and (not path.is_dir() or any(path.iterdir())):
                raise RunError(f"{path}: exists and is not a streamgmm run; name another folder with --output")
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise RunError(f"{path}: cannot be used for a run ({error.strerror}); name another folder") from None
        self.checkpoints: Checkpoints | None = None

    def begin(self, identity: Mapping[str, object]) -> Checkpoints:
        """Tie the folder to ``identity`` (JSON values), or make sure that it already is.

        Raises
        ------
        RunError
            The run was made from other data or other settings.
        """
        config = self.path / "config.json"
        if config.exists():
            self._compare(json.loads(_read(config)), identity)
        try:
            write_atomic(config, json.dumps(dict(identity), indent=1, sort_keys=True).encode())
            self.checkpoints = Checkpoints(self.path / "checkpoints", identity)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); free space or name another") from None
        return self.checkpoints

    def result(self) -> tuple[Mixture, dict[str, object]] | None:
        """The finished model and its metadata, or None while the run is unfinished."""
        if not (self.path / "model.safetensors").exists():
            return None
        return load_model(self.path)

    def write_history(self, history: History) -> None:
        """Replace ``history.jsonl``: after a kill it may hold lines that the checkpoint has not seen."""
        write_atomic(self.path / "history.jsonl", "".join(_line(record) for record in history).encode())

    def append_history(self, record: Mapping[str, object]) -> None:
        """Add a line to ``history.jsonl``."""
        with (self.path / "history.jsonl").open("a") as file:
            file.write(_line(record))

    def finish(self, mixture: Mixture, result: Mapping[str, object]) -> None:
        """Write the model, with ``result`` in its metadata."""
        mixture.save(self.path / "model.safetensors", result=dict(result))

    def close(self) -> None:
        """Let another process have the folder."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        self._lock.close()

    def _is_run(self) -> bool:
        return (self.path / "config.json").exists() or (self.path / ".lock").exists()

    def _locked(self) -> _Lock:
        return _Lock(self.path / ".lock")

    def _compare(self, there: object, asked: Mapping[str, object]) -> None:
        if not isinstance(there, dict):
            raise DamagedFileError(f"{self.path}/config.json: not a run's settings; start over with --fresh")
        for name in sorted({*there, *asked} - set(_EXTENDABLE)):
            before, now = there.get(name), json.loads(json.dumps(asked.get(name)))
            if before != now:
                what = "the data changed" if name == "fingerprint" else f"{name} was {before!r} and is now {now!r}"
                raise RunError(
                    f"{self.path}: was made differently ({what}); name another --output, or start over with --fresh"
                )


class _Lock:
    """An exclusive ``flock``, also usable as a context."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise RunError(f"{path.parent}: another process is working in it; wait for it, or name another") from None

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
        json.loads(text)
    except ValueError:
        raise DamagedFileError(f"{path}: not JSON; start over with --fresh") from None
    return text
