"""Numbers of one type in a file of their own, read and written at any place by any thread."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from streamgmm.storage import naming


class Column:
    """A private file at ``path`` that holds ``count`` numbers at first, those that are there where it was longer."""

    def __init__(self, path: Path, dtype: DTypeLike, count: int = 0) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(self._file, count * self._dtype.itemsize)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Numbers ``start`` to ``start + count``; OSError where the file ends before."""
        out: NDArray[Any] = np.empty(count, self._dtype)
        view, done, offset = out.view(np.uint8).data, 0, start * self._dtype.itemsize
        with naming(self._path):
            while done < len(view):
                read = os.preadv(self._file, [view[done:]], offset + done)
                if read == 0:
                    raise OSError(errno.EIO, "ended early")
                done += read
        return out

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Put ``values``, of the column's type, at ``start``."""
        assert values.dtype == self._dtype
        view = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        done, offset = 0, start * self._dtype.itemsize
        with naming(self._path):
            while done < len(view):
                done += os.pwrite(self._file, view[done:], offset + done)

    def sync(self) -> None:
        """Make what was written safe."""
        with naming(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
