"""The table of lists, a row a vector, on disk as it grows: what an interrupted assignment goes on from.

A row of the table holds its vector's lists (int32, -1 behind the last) and, where they are kept, responsibilities
(float32). The number of rows that are safely there is written after they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.column import Column
from streamgmm.statistics import BLOCK_ROWS
from streamgmm.storage import parse_json, read_small, sync_folder, write_atomic

SYNC_SECONDS = 10.0
"""At most so much work is done again after a kill."""


class Spill:
    """Files in ``folder``: ``lists``, perhaps ``resp``, and ``state.json``.

    Parameters
    ----------
    n_rows : int
        Rows that the table will have.
    identity : mapping
        JSON values that everything in the table follows from. Rows that were made otherwise are discarded.
    """

    def __init__(
        self, folder: Path, n_rows: int, columns: int, with_resp: bool, identity: Mapping[str, object]
    ) -> None:
        self._folder, self._n_rows, self.columns, self.with_resp = folder, n_rows, columns, with_resp
        self._identity = json.loads(json.dumps(dict(identity)))
        self._names = ["lists", "resp"] if with_resp else ["lists"]
        self.rows = self._rows_there()
        self.resumed = self.rows > 0
        if not self.resumed:
            # What it says of the rows that are about to be written over would be believed after a kill.
            (folder / "state.json").unlink(missing_ok=True)
            sync_folder(folder)
        types = zip(self._names, (np.int32, np.float32), strict=False)
        self._parts = [Column(folder / name, dtype, self.rows * columns) for name, dtype in types]
        self._synced = time.monotonic()

    def _rows_there(self) -> int:
        """Rows of this identity that are safely on disk."""
        try:
            state = parse_json(read_small(self._folder / "state.json"))
        except (OSError, ValueError, RecursionError):
            return 0
        if not isinstance(state, dict) or state.get("identity") != self._identity:
            return 0
        rows = state.get("rows")
        sizes = [path.stat().st_size if (path := self._folder / name).is_file() else 0 for name in self._names]
        if not isinstance(rows, int) or not 0 < rows <= min(sizes) // (self.columns * 4):
            return 0
        # Whole blocks: what is computed from there on does not depend on where it was interrupted.
        return rows if rows == self._n_rows else rows // BLOCK_ROWS * BLOCK_ROWS

    def append(self, lists: NDArray[np.int32], resp: NDArray[np.float32] | None) -> None:
        """Add rows, (n, columns) each; now and then they are made safe."""
        values = [lists] if resp is None else [lists, resp]
        for part, own in zip(self._parts, values, strict=True):
            part.write(self.rows * self.columns, own)
        self.rows += len(lists)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make every row safe."""
        for part in self._parts:
            part.sync()
        state = {"identity": self._identity, "rows": self.rows}
        write_atomic(self._folder / "state.json", json.dumps(state).encode())
        self._synced = time.monotonic()

    def read(self, start: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        """Lists and responsibilities of ``count`` rows from ``start`` on, fewer at the end; from any thread."""
        count = min(count, self.rows - start)
        lists, *resp = (
            part.read(start * self.columns, count * self.columns).reshape(count, self.columns) for part in self._parts
        )
        return lists, resp[0] if resp else None

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
