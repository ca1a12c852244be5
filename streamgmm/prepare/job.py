"""What the tasks of one preparation share, and what they note of the files that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.prepare.identifiers import Identifiers
from streamgmm.prepare.inputs import Reference
from streamgmm.prepare.permutation import Permutation
from streamgmm.prepare.selection import Ranks, Recipe
from streamgmm.prepare.shards import Layout, digest_of
from streamgmm.transforms import Transformation

Noted = dict[str, Any]

OUTPUTS = ("rows", "held-out")
"""Folders of the arrays, by output; their row numbers lie in ``rows.ids`` and ``held-out.ids``."""


@dataclass(frozen=True, eq=False)
class Survey:
    """What a pass over the rows is to find out: how many there are for each output, and moments of the training rows.

    Attributes
    ----------
    name : str
        Of its folder.
    recipe : Recipe
        What is known of the way so far.
    needs : str
        `NOTHING` but counts, `COLUMNS`, or `FULL`.
    lenient : bool
        Whether values that are not finite may be there.
    """

    name: str
    recipe: Recipe
    needs: str
    lenient: bool


@dataclass(frozen=True, eq=False)
class Job:
    """What the tasks of one preparation share, once it is known; small enough to be sent to every worker."""

    reference: Reference
    folder: str
    survey: Survey | None = None
    recipe: Recipe | None = None
    transformation: Transformation | None = None
    ranks: Ranks | None = None
    layouts: tuple[Layout, ...] = ()
    with_ids: bool = False
    identifiers: Identifiers | None = None
    """What rows are called, where it is not their numbers."""
    shuffle: int | None = None
    """Seed of the permutation."""
    run_rows: int = 0

    def ids_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """What is written of rows by their ``numbers`` in the source, which ascend."""
        return numbers if self.identifiers is None else self.identifiers.of(numbers)

    def relative(self, path: Path) -> str:
        """The name of a file of the workspace, as the journal has it."""
        return path.relative_to(self.folder).as_posix()

    def shard(self, output: int, shard: int) -> Path:
        return Path(self.folder, OUTPUTS[output], self.layouts[output].key(shard))

    def ids_layout(self, output: int) -> Layout:
        rows = self.layouts[output]
        return Layout(rows.shape[:1], "int64", rows.chunk_rows, rows.shard_rows)

    def ids_shard(self, output: int, shard: int) -> Path:
        return Path(self.folder, f"{OUTPUTS[output]}.ids", self.ids_layout(output).key(shard))

    def run(self, run: int) -> Path:
        return Path(self.folder, "runs", f"{run:06d}.run")

    @property
    def n_runs(self) -> int:
        assert self.ranks is not None
        return -(-self.ranks.n_samples // self.run_rows)

    def bucket(self, output: int) -> int:
        """Number of the first shard of an output, those of all outputs counted."""
        return sum(layout.n_shards for layout in self.layouts[:output])

    def permutation(self, output: int) -> Permutation:
        assert self.shuffle is not None
        # The held-out rows are in an order of their own.
        return Permutation(self.layouts[output].shape[0], 2 * self.shuffle + output)


def is_whole(folder: str, files: Sequence[tuple[str, str]]) -> bool:
    """Whether finished files are as the journal notes them: names in ``folder``, and their SHA-256."""
    try:
        return all(digest_of(Path(folder, name)) == digest for name, digest in files)
    except OSError:
        return False


def noted(folder: str, path: Path, rows: int) -> Noted:
    """What the journal notes of a file in ``folder``."""
    name = path.relative_to(folder).as_posix()
    return {"files": {name: digest_of(path)}, "bytes": path.stat().st_size, "rows": rows}
