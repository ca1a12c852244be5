"""One file opened once, read at any offset by any thread."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent, read_extent


class RawFile:
    """A regular file open for positioned reads.

    Reads go through ``preadv``, not a memory map: a map's pages count as this process's memory, and a file that shrinks
    under a map ends the process with SIGBUS where a short read is an error with a message.

    Attributes
    ----------
    path : str
    size : int
        Bytes when it was opened.

    Raises
    ------
    DataError
        No such file, not a regular file, or not readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            # Before opening: opening a FIFO would wait for a writer.
            if not stat.S_ISREG(Path(self.path).stat().st_mode):
                raise DataError(f"{self.path}: is not a regular file; give a file")
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise unreadable(self.path, error) from error
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        self.size = os.fstat(descriptor).st_size

    def extent(self, offset: int, length: int) -> Extent:
        """Bytes [offset, offset + length) of this file."""
        return Extent(self.path, self._descriptor, offset, length)

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill ``out``, C-contiguous of any type, with the bytes from ``offset``.

        Raises
        ------
        DataError
            The file ends early or cannot be read.
        """
        if not out.flags.c_contiguous:
            raise ValueError("out must be C-contiguous")
        read_extent(self.extent(offset, out.nbytes), out.reshape(-1).view(np.uint8))

    def close(self) -> None:
        """Close the descriptor; later reads are a DataError."""
        # The number may be given to another file: never read through it again.
        self._descriptor = -1
        self._finalizer()


def unreadable(path: str, error: Exception) -> DataError:
    """The one-line error for a path that the file system refuses."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file or folder; check the path")
    if isinstance(error, PermissionError):
        return DataError(f"{path}: permission denied; make it readable for this user")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(f"{path}: cannot be opened ({reason}); check the path and the limit on open files (ulimit -n)")


def check_size(path: str, found: int, expected: int) -> None:
    """Compare a file's size with what its header promises; both are Python integers, so nothing overflows.

    Raises
    ------
    DataError
        The sizes differ.
    """
    if found != expected:
        state = "truncated" if found < expected else "longer than its header says"
        raise DataError(
            f"{path}: is {state}: its header needs {expected} bytes, the file has {found}; restore it or write it again"
        )
