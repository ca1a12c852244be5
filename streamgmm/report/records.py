"""What a RUN folder, finished or not, tells about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from streamgmm.checkpoint import Checkpoints, History
from streamgmm.errors import DataError, RunError
from streamgmm.mixture import Mixture, load_model
from streamgmm.run import read_settings

_ATTEMPTS = 3

_DRAWN = (
    *("lower_bound", "change", "n_passes", "effective_components"),
    *("update_seconds", "update_bytes", "update_waiting"),
)
"""Fields of a history that are drawn: numbers, or None."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A mixture and where it comes from.

    Attributes
    ----------
    path : Path
        A RUN folder or a model file.
    finished : bool
        Otherwise ``mixture`` is the best of the latest checkpoint.
    mixture : Mixture
    history : tuple of dict
        The records of ``history.jsonl``; empty for a model file.
    settings : dict
        What ``config.json`` says; empty for a model file.
    result : dict
        What the fit told at its end; empty while it is unfinished.
    models : tuple of dict
        Where several sizes were fitted together, what the fit told of each.
    """

    path: Path
    finished: bool
    mixture: Mixture
    history: History
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    models: tuple[Mapping[str, Any], ...] = ()

    @property
    def best_history(self) -> History:
        """The records of the mixture's own candidate: of its size at last, and with the highest last lower bound."""
        candidates: dict[object, list[dict[str, object]]] = {}
        for record in self.history:
            if record.get("lower_bound") is not None:
                candidates.setdefault(record.get("candidate", 0), []).append(record)
        k = self.mixture.n_components
        own = [records for records in candidates.values() if records[-1].get("n_components", k) == k]
        nothing: list[dict[str, object]] = []
        best = max(own, key=lambda records: float(str(records[-1]["lower_bound"])), default=nothing)
        return tuple(best)


def read_run(path: str | Path, warn: Callable[[str], None] = lambda text: None) -> RunRecord:
    """Read a RUN folder or a model file; a run that another process works on may be read at any time.

    ``warn`` hears of damaged checkpoints that were passed over.

    Raises
    ------
    DataError, RunError
        There is no such run, or it has nothing to show yet.
    DamagedFileError
        Its model, its settings or all of its checkpoints are damaged.
    """
    path = Path(path)
    if path.is_dir() and not (path / "model.safetensors").exists():
        return _unfinished(path, warn)
    mixture, metadata = load_model(path)
    result = _result(metadata)
    is_run = path.is_dir() and (path / "config.json").exists()
    return RunRecord(
        path,
        True,
        mixture,
        _history(path / "history.jsonl") if is_run else (),
        read_settings(path) if is_run else {},
        result,
        _models(path, result) if is_run else (),
    )


def _result(metadata: Mapping[str, object]) -> Mapping[str, Any]:
    result = metadata.get("result")
    return result if isinstance(result, dict) else {}


def _models(path: Path, result: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    sizes = result.get("sizes", ())
    return tuple(_result(load_model(path / "models" / f"{k}.safetensors")[1]) for k in sizes) if len(sizes) > 1 else ()


def _unfinished(path: Path, warn: Callable[[str], None]) -> RunRecord:
    if not (path / "config.json").exists():
        raise RunError(f"{path}: is no RUN folder (it has neither a model nor a config.json); name one")
    settings = read_settings(path)
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path / "checkpoints", settings)
        try:
            found = _latest(checkpoints, warn)
        finally:
            checkpoints.close()
        if found is not None:
            state, history, _ = found
            return RunRecord(path, False, state.best.result, history, settings, {})
    raise RunError(f"{path}: has no checkpoint yet, so there is nothing to show; wait, or run its fit again")


def _latest(checkpoints: Checkpoints, warn: Callable[[str], None]) -> Any:
    for attempt in range(_ATTEMPTS):
        try:
            return checkpoints.latest(torch.device("cpu"), warn)
        except DataError:
            # The run goes on: it removed this generation after writing two newer ones.
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _history(path: Path) -> History:
    """The whole lines of a history; a line that was being written when the machine went down is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ()
    return tuple(record for line in lines if (record := _record(line)) is not None)


def _record(line: str) -> dict[str, object] | None:
    """One line of a history, or None where it is not what a recorder writes."""
    try:
        record = json.loads(line)
        drawn = {name: record[name] for name in _DRAWN if record.get(name) is not None}
        whole = isinstance(record["iteration"], int) and all(isfinite(value) for value in drawn.values())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return record if whole else None
