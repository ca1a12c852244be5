"""The table of lists, a row a vector, on disk as it grows: what an interrupted assignment goes on from.

A row of the table holds its vector's lists (int32, -1 behind the last) and, where they are kept, responsibilities
(float32). The number of rows that are safely there is written after they are.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from streamgmm.statistics import BLOCK_ROWS
from streamgmm.storage import naming, parse_json, read_small, write_atomic

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
        self._folder, self._n_rows, self.columns = folder, n_rows, columns
        self._identity = json.loads(json.dumps(dict(identity)))
        self._names = ["lists", "resp"] if with_resp else ["lists"]
        self.rows = self._rows_there()
        self.resumed = self.rows > 0
        self._files = [self._open(name) for name in self._names]
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

    def _open(self, name: str) -> int:
        path = self._folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(descriptor, self.rows * self.columns * 4)
        os.lseek(descriptor, 0, os.SEEK_END)
        return descriptor

    def append(self, lists: NDArray[np.int32], resp: NDArray[np.float32] | None) -> None:
        """Add rows, (n, columns) each; now and then they are made safe."""
        parts = [lists] if resp is None else [lists, resp]
        for descriptor, name, part in zip(self._files, self._names, parts, strict=True):
            view: memoryview = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            with naming(self._folder / name):
                while len(view):
                    view = view[os.write(descriptor, view) :]
        self.rows += len(lists)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make every row safe."""
        for descriptor, name in zip(self._files, self._names, strict=True):
            with naming(self._folder / name):
                os.fsync(descriptor)
        state = {"identity": self._identity, "rows": self.rows}
        write_atomic(self._folder / "state.json", json.dumps(state).encode())
        self._synced = time.monotonic()

    def blocks(self, rows: int) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32] | None]]:
        """First row, lists and responsibilities of every ``rows`` rows, in order."""
        for start in range(0, self.rows, rows):
            count = min(rows, self.rows - start)
            raw = [_read(descriptor, start * self.columns * 4, count * self.columns * 4) for descriptor in self._files]
            lists: NDArray[np.int32] = np.frombuffer(raw[0], np.int32).reshape(count, self.columns)
            resp: NDArray[np.float32] | None = None
            if len(raw) > 1:
                resp = np.frombuffer(raw[1], np.float32).reshape(count, self.columns)
            yield start, lists, resp

    def close(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(descriptor: int, offset: int, length: int) -> bytearray:
    out = bytearray(length)
    view, done = memoryview(out), 0
    while done < length:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the table of lists ended early")
        done += count
    return out
