"""The RUN folder: ``config.json``, ``history.jsonl``, ``checkpoints/``, and at the end ``model.safetensors``."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from streamgmm.checkpoint import Checkpoints, History, Loaded
from streamgmm.errors import DamagedFileError, RunError
from streamgmm.mixture import Mixture, load_model
from streamgmm.storage import naming, parse_json, read_small, write_atomic
from streamgmm.transforms import Transformation

_EXTENDABLE = ("max_iter", "max_passes")
"""Settings that may grow between calls: they say when to stop, not what to compute."""

_FREE = ("memory", "chunk rows", "threads", "number of devices", "checkpoint interval")
"""What changes no bit, as a person calls it."""

_CALLED = {"fingerprint": "data", "shape": "data", "start": "given starting parameters", "device": "kind of device"}

_CHANGED = {"fingerprint": "the data changed", "start": "the given starting parameters changed"}
"""What to say where the values would tell a person nothing."""


_SHORT, _MANY = 40, 4


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
        # "." and ".." have no name of their own to put a number behind.
        path = path if path.name not in ("", "..") else path.resolve()
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
        """Make sure that the folder belongs to ``identity`` (JSON values), or to nothing yet; `commit` ties it.

        Raises
        ------
        RunError
            The run was made from other data or other settings.
        """
        self._identity = identity
        try:
            self.checkpoints = Checkpoints(self.path / "checkpoints", identity)
            self.checkpoints.sweep()
            # A call that failed before it saved anything does not tie the folder to its settings.
            if self.checkpoints.paths() or (self.path / "model.safetensors").exists():
                self._compare(read_settings(self.path), identity)
        except OSError as error:
            raise self._unwritable(error) from None
        return self.checkpoints

    def commit(self) -> None:
        """Write down what the run is: work on it begins."""
        try:
            settings = json.dumps(dict(self._identity), indent=1, sort_keys=True)
            write_atomic(self.path / "config.json", settings.encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def latest(self, device: torch.device, warn: Callable[[str], None]) -> Loaded | None:
        """The newest checkpoint that is whole, or None; it must be of the run that `begin` named. Raises as they do."""
        loaded = None if self.checkpoints is None else self.checkpoints.latest(device, warn)
        if loaded is not None:
            self._compare(loaded[2], self._identity)
        return loaded

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
        path = self.path / "history.jsonl"
        with naming(path), path.open("a") as file:
            file.write(_line(record))

    def save_model(
        self, size: int, mixture: Mixture, result: Mapping[str, object], transformation: Transformation | None = None
    ) -> None:
        """Write one model of several, by the components asked for, as `finish` writes the best."""
        folder = self.path / "models"
        folder.mkdir(exist_ok=True)
        mixture.save(folder / f"{size}.safetensors", transformation, result=dict(result))

    def load_model(self, size: int) -> tuple[Mixture, dict[str, object]]:
        """What `save_model` wrote: the mixture and its ``result``. Raises as `mixture.load_model`."""
        path = self.path / "models" / f"{size}.safetensors"
        mixture, metadata = load_model(path)
        result = metadata.get("result")
        if not isinstance(result, dict):
            raise DamagedFileError(f"{path}: says nothing about its fit; restore it, or start over with --fresh")
        return mixture, result

    def finish(
        self, mixture: Mixture, result: Mapping[str, object], transformation: Transformation | None = None
    ) -> None:
        """Write the model, with ``result`` in its metadata, and what was done to raw vectors before."""
        mixture.save(self.path / "model.safetensors", transformation, result=dict(result))

    def close(self) -> None:
        """Let another process have the folder."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        self._lock.close()

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written ({error.strerror}); free space or name another")

    def _is_run(self) -> bool:
        # Others write a config.json too.
        settings = (self.path / "config.json").exists() and (self.path / "checkpoints").is_dir()
        return settings or (self.path / ".lock").exists()

    def _locked(self) -> _Lock:
        return _Lock(self.path / ".lock")

    def _compare(self, there: Mapping[str, object], asked: Mapping[str, object]) -> None:
        asked = json.loads(json.dumps(dict(asked)))
        names = sorted({*there, *asked} - set(_EXTENDABLE))
        different = [
            _CHANGED.get(name, f"{name} was {_short(there.get(name))} and is now {_short(asked.get(name))}")
            for name in names
            if there.get(name) != asked.get(name)
        ]
        if different:
            raise RunError(
                f"{self.path}: was made differently ({_short_list(different)}); name another --output, or start over "
                f"with --fresh ({', '.join(_called(asked))} must match; "
                f"{', '.join(_EXTENDABLE)} may grow; {', '.join(_FREE)} may differ)"
            )


class _Lock:
    """An exclusive ``flock``, also usable as a context."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise _in_use(path.parent) from None
        # Between opening and locking, --fresh of another process may have moved the folder aside.
        if not (path.exists() and os.path.samestat(os.fstat(self._descriptor), path.stat())):
            os.close(self._descriptor)
            raise _in_use(path.parent)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _in_use(folder: Path) -> RunError:
    return RunError(f"{folder}: another process is working in it; wait for it, or name another")


def _called(settings: Mapping[str, object]) -> list[str]:
    """What must match, as a person calls it."""
    return sorted({_CALLED.get(name, name) for name in settings} - {*_EXTENDABLE, "format"})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else text[:_SHORT] + "…"


def _short_list(parts: list[str]) -> str:
    more = f", and {len(parts) - _MANY} more" if len(parts) > _MANY else ""
    return ", ".join(parts[:_MANY]) + more


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record) + "\n"


def read_settings(run: Path) -> dict[str, object]:
    """What the ``config.json`` of a RUN folder says it is.

    Raises
    ------
    RunError
        The file is missing.
    DamagedFileError
        It is not a JSON object.
    """
    path = run / "config.json"
    try:
        settings = parse_json(read_small(path))
    except FileNotFoundError:
        raise RunError(f"{path}: is missing, so nobody knows what the run was; start over with --fresh") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise DamagedFileError(f"{path}: not JSON; start over with --fresh") from None
    if not isinstance(settings, dict):
        raise DamagedFileError(f"{path}: not a run's settings; start over with --fresh")
    return settings
