"""A run's state on disk: one verified file a generation, the last two kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from streamgmm.errors import DamagedFileError
from streamgmm.frame import Frame
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics, SummationTree
from streamgmm.steps.em import Candidate
from streamgmm.storage import load_tensors, save_tensors
from streamgmm.training import PartialPass, TrainingState

GENERATIONS = 2

History = tuple[dict[str, object], ...]

Loaded = tuple[TrainingState, History, dict[str, object]]


def snapshot(state: TrainingState) -> TrainingState:
    """A copy on the host that the run's further additions do not touch; finished tree nodes never change."""
    partials = tuple(PartialPass(p.tree, p.segment.clone().to("cpu")) for p in state.partials)
    return replace(state, partials=partials)


def save_state(path: Path, state: TrainingState, history: History, identity: Mapping[str, object]) -> None:
    """Write a state, its history, and the ``identity`` of the run it belongs to."""
    tensors = state.frame.tensors("frame.")
    for i, candidate in enumerate(state.candidates):
        tensors |= candidate.mixture.tensors(f"candidate.{i}.")
    for i, partial in enumerate(state.partials):
        tensors |= partial.segment.tensors(f"partial.{i}.segment.")
        for j, (_, node) in enumerate(partial.tree.nodes):
            tensors |= {} if node is None else node.tensors(f"partial.{i}.node.{j}.")
    metadata = {
        "format": "streamgmm-checkpoint",
        "version": 1,
        "identity": dict(identity),
        "history": list(history),
        "cursor": state.cursor,
        "rows_read": state.rows_read,
        "checksums": list(state.checksums),
        "open_checksum": state.open_checksum,
        "covariance_type": state.candidates[0].mixture.covariance_type,
        "candidates": [
            {
                "digest": c.mixture.digest,
                "precision": c.precision,
                "lower_bounds": list(c.lower_bounds),
                "converged": c.converged,
                "empty": list(c.empty),
                "degenerate": list(c.degenerate),
            }
            for c in state.candidates
        ],
        "partials": [[[level, node is not None] for level, node in p.tree.nodes] for p in state.partials],
    }
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
        raise DamagedFileError(f"{path}: holds {metadata.get('format')!r}, not a streamgmm checkpoint")
    try:
        return _state_of(tensors, metadata, device)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path}: not a usable checkpoint ({error!r}); remove it to use an older one") from None


def _state_of(tensors: Mapping[str, np.ndarray], metadata: dict[str, object], device: torch.device) -> Loaded:
    fields: dict[str, object] = metadata
    kind = str(fields["covariance_type"])

    def statistics(prefix: str) -> Statistics:
        return Statistics.from_tensors(tensors, kind, prefix, device)

    candidates = []
    for i, facts in enumerate(_list(fields["candidates"])):
        mixture = Mixture.from_tensors(tensors, kind, f"candidate.{i}.")
        if mixture.digest != facts["digest"]:
            raise ValueError("a mixture does not match its digest")
        candidates.append(
            Candidate(
                mixture,
                facts["precision"],
                tuple(facts["lower_bounds"]),
                facts["converged"],
                tuple(facts["empty"]),
                tuple(facts["degenerate"]),
            )
        )
    partials = []
    for i, nodes in enumerate(_list(fields["partials"])):
        tree = SummationTree(
            tuple(
                (int(level), statistics(f"partial.{i}.node.{j}.") if filled else None)
                for j, (level, filled) in enumerate(nodes)
            )
        )
        partials.append(PartialPass(tree, statistics(f"partial.{i}.segment.")))
    state = TrainingState(
        tuple(candidates),
        Frame.from_tensors(tensors, "frame."),
        int(str(fields["cursor"])),
        tuple(partials),
        int(str(fields["rows_read"])),
        tuple((int(segment), int(checksum)) for segment, checksum in _list(fields["checksums"])),
        None if fields["open_checksum"] is None else int(str(fields["open_checksum"])),
    )
    identity = fields["identity"]
    if not isinstance(identity, dict):
        raise TypeError("identity is not a mapping")
    return state, tuple(_list(fields["history"])), identity


def _list(value: object) -> list:  # type: ignore[type-arg]
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return value


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
        folder.mkdir(parents=True, exist_ok=True)
        self._next = max((_generation(path) for path in self.paths()), default=0) + 1

    def paths(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return sorted(self._folder.glob("[0-9]*.safetensors"), key=_generation, reverse=True)

    def latest(self, device: torch.device, warn: Callable[[str], None]) -> Loaded | None:
        """The newest checkpoint that is whole, or None when there is none; ``warn`` hears of damaged ones.

        Raises
        ------
        DamagedFileError
            There are checkpoints, and every one is damaged.
        """
        paths = self.paths()
        for path in paths:
            try:
                return load_state(path, device)
            except DamagedFileError as error:
                warn(f"{error}; looking for an older one")
        if paths:
            raise DamagedFileError(f"{self._folder}: every checkpoint is damaged; start over with --fresh")
        return None

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
        for path in self.paths()[GENERATIONS:]:
            path.unlink(missing_ok=True)


def _generation(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0
