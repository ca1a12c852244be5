"""A run's state on disk: one verified file a generation, the last two kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamgmm.consistency import check_consistent
from streamgmm.errors import DamagedFileError, DataError
from streamgmm.state import TrainingState, pack, snapshot, unpack
from streamgmm.storage import load_tensors, save_tensors

GENERATIONS = 2

_VERSION = 2

History = tuple[dict[str, object], ...]

Loaded = tuple[TrainingState, History, dict[str, object]]


def save_state(path: Path, state: TrainingState, history: History, identity: Mapping[str, object]) -> None:
    """Write a state, its history, and the ``identity`` of the run it belongs to."""
    facts, arrays = pack(state)
    metadata = {
        **facts,
        "format": "streamgmm-checkpoint",
        "version": _VERSION,
        "identity": dict(identity),
        "history": list(history),
        "digests": [candidate.mixture.digest for candidate in state.candidates],
    }
    tensors = {name: array.cpu().numpy() if isinstance(array, Tensor) else array for name, array in arrays.items()}
    save_tensors(path, tensors, metadata)


def load_state(path: Path, device: torch.device) -> Loaded:
    """What `save_state` wrote: state (sums on ``device``), history, identity.

    Raises
    ------
    DataError, DamagedFileError
        The file is missing, damaged, or not a checkpoint.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != "streamgmm-checkpoint":
        raise DamagedFileError(f"{path}: holds {str(metadata.get('format'))[:40]!r}, not a streamgmm checkpoint")
    try:
        loaded = _state_of(tensors, metadata, device)
        check_consistent(loaded[0])
        return loaded
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = repr(error)[:200]
        raise DamagedFileError(f"{path}: not a usable checkpoint ({reason}); remove it to use an older one") from None


def _state_of(tensors: Mapping[str, np.ndarray], metadata: dict[str, object], device: torch.device) -> Loaded:
    """Sums on ``device``, where rows will be added to them."""
    if metadata["version"] != _VERSION:
        raise ValueError(f"its version is {metadata['version']!r}, and this one reads {_VERSION}")
    placed = {
        name: torch.tensor(array, device=device if name.startswith(("tree.", "open.")) else None)
        for name, array in tensors.items()
    }
    state = unpack(metadata, placed)
    if metadata["digests"] != [candidate.mixture.digest for candidate in state.candidates]:
        raise ValueError("a mixture does not match its digest")
    identity, history = metadata["identity"], metadata["history"]
    if not isinstance(identity, dict) or not isinstance(history, list):
        raise TypeError("identity or history is not what it should be")
    return state, tuple(history), identity


def generations(folder: Path) -> list[Path]:
    """Complete checkpoints in a ``checkpoints`` folder, newest first."""
    return sorted(folder.glob("[0-9]*.safetensors"), key=_number, reverse=True)


def newest(folder: Path, device: torch.device, warn: Callable[[str], None]) -> tuple[Loaded | None, list[Path]]:
    """The newest checkpoint that is whole, or None when there is none; and the damaged ones that are newer.

    Raises
    ------
    DamagedFileError
        There are checkpoints, and every one is damaged.
    """
    damaged: list[Path] = []
    for path in generations(folder):
        try:
            return load_state(path, device), damaged
        except (DamagedFileError, DataError) as error:
            warn(f"{error}; looking for an older one")
            damaged.append(path)
    if damaged:
        raise DamagedFileError(f"{folder}: every checkpoint is damaged; start over with --fresh")
    return None, damaged


class Checkpoints:
    """The ``checkpoints`` folder of a RUN: numbered generations, written by one background thread.

    Snapshots are handed over and the run goes on; when the writer is behind, only the newest waits.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self._folder = folder
        self._identity = identity
        self._writer = ThreadPoolExecutor(1, "streamgmm-checkpoint")
        self._writes = deque[Future[None]]()
        self._newest: tuple[TrainingState, History] | None = None
        self._damaged: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._next = max((_number(path) for path in self.paths()), default=0) + 1

    def paths(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return generations(self._folder)

    def sweep(self) -> None:
        """Remove what a killed process left half-written; only for who holds the run's lock."""
        for path in self._folder.glob(".[0-9]*.safetensors.tmp"):
            path.unlink(missing_ok=True)

    def latest(self, device: torch.device, warn: Callable[[str], None]) -> Loaded | None:
        """The newest checkpoint that is whole, or None; ``warn`` hears of damaged ones. Raises as `newest`."""
        loaded, self._damaged = newest(self._folder, device, warn)
        return loaded

    def save(self, state: TrainingState, history: History) -> None:
        """Write a snapshot of ``state`` soon.

        Raises
        ------
        OSError
            An earlier write failed; the generations before it are untouched.
        """
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()
        self._newest = (snapshot(state), history)
        self._writes.append(self._writer.submit(self._write_newest))

    def flush(self) -> None:
        """Return once everything handed over is durable; raises what `save` would."""
        while self._writes:
            self._writes.popleft().result()

    def close(self) -> None:
        """Stop the writer after the writes in progress."""
        self._writer.shutdown(wait=True)

    def _write_newest(self) -> None:
        item, self._newest = self._newest, None
        if item is None:  # a later snapshot was written in place of this one
            return
        save_state(self._folder / f"{self._next:08d}.safetensors", *item, self._identity)
        self._next += 1
        # Damaged ones first: they must not take the place of the one that is whole.
        for path in self._damaged:
            path.unlink(missing_ok=True)
        self._damaged = []
        for path in self.paths()[GENERATIONS:]:
            path.unlink(missing_ok=True)


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0
