"""What a preparation tells while it works and when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streamgmm.errors import RequestError
from streamgmm.prepare.workspace import free_name, read_manifest, refuse_other
from streamgmm.transforms import FILE, Transformation


class PrepareProgress(Protocol):
    """What a caller may want to see."""

    def stage(self, name: str, total: int) -> None:
        """``total`` tasks of a stage begin."""

    def advance(self) -> None:
        """One of them is done."""

    def tell(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """Nobody watches."""

    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def tell(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Prepared:
    """What a preparation made.

    Attributes
    ----------
    path, held_out, ids, held_out_ids : Path or None
        The arrays; None where they were not asked for.
    shape, held_out_shape : (N, d)
    n_source : int
        Rows of the source; those that are in neither array were dropped.
    transformation : Transformation
    resumed : bool
        Whether files of an earlier call were taken up.
    seconds, stages : float, dict of str to float
        Of this call.
    workers, needed_bytes : int
        Tasks at once, and what they may hold together.
    """

    path: Path
    held_out: Path | None
    ids: Path | None
    held_out_ids: Path | None
    shape: tuple[int, int]
    held_out_shape: tuple[int, int]
    n_source: int
    transformation: Transformation
    resumed: bool
    seconds: float = 0.0
    stages: Mapping[str, float] | None = None
    workers: int = 0
    needed_bytes: int = 0

    @property
    def facts(self) -> dict[str, object]:
        """JSON values."""
        rows, held = self.shape[0], self.held_out_shape[0]
        size = (rows + held) * self.shape[1] * self.transformation.dtype.itemsize
        return {
            "n_samples": rows,
            "n_features": self.shape[1],
            "n_held_out": held,
            "n_source": self.n_source,
            "n_dropped": self.n_source - rows - held,
            "dtype": self.transformation.dtype.name,
            "bytes": size,
            "written": [str(each) for each in (self.path, self.held_out, self.ids, self.held_out_ids) if each],
            "transformation": self.transformation.digest,
            "steps": list(self.transformation.steps),
            "seconds": self.seconds,
            "stages": dict(self.stages or {}),
            "workers": self.workers,
            "needed_bytes": self.needed_bytes,
            "resumed": self.resumed,
        }


def finished(targets: Mapping[str, Path], identity: Mapping[str, object], *, fresh: bool) -> Prepared | None:
    """What is at the destination already, where it is what is asked for; with ``fresh`` it is moved aside."""
    there = [target for target in targets.values() if target.exists()]
    destination = targets["rows"]
    if not there:
        return None
    manifest = read_manifest(destination)
    complete = len(there) == len(targets)
    if manifest is None or not (complete or fresh):
        raise RequestError(f"{there[0]}: exists and is not this preparation's; remove it, or name another destination")
    if fresh:
        for target in there:
            target.rename(free_name(target))
        return None
    refuse_other(destination, manifest["identity"], identity)
    facts = manifest["result"]
    return Prepared(
        path=destination,
        held_out=targets.get("held-out"),
        ids=targets.get("rows.ids"),
        held_out_ids=targets.get("held-out.ids"),
        shape=(facts["n_samples"], facts["n_features"]),
        held_out_shape=(facts["n_held_out"], facts["n_features"]),
        n_source=facts["n_source"],
        transformation=Transformation.load(destination / FILE),
        resumed=True,
    )
