"""One file opened once, read at any offset by any thread."""

from __future__ import annotations

import errno
import os
import resource
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.direct import fill_direct
from streamgmm.io.plan import Extent, forget, read_extent, read_failed


def typed_by_suffix(path: str | os.PathLike[str], dtypes: Mapping[str, np.dtype[np.generic]]) -> np.dtype[np.generic]:
    """The type of the values in a file whose suffix tells it; DataError where ``dtypes`` lacks the suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in dtypes:
        raise DataError(f"{os.fspath(path)}: suffix {suffix!r} names no type; use one of {', '.join(dtypes)}")
    return dtypes[suffix]


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
            descriptor = _open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise unreadable(self.path, error) from error
        self._descriptor = descriptor
        self._finalizer: weakref.finalize[..., RawFile] = weakref.finalize(self, _close, descriptor)
        self.size = os.fstat(descriptor).st_size
        self._lock = Lock()
        self._direct: int | None = None
        self._refused: str | None = None

    def extent(self, offset: int, length: int) -> Extent:
        """Bytes [offset, offset + length) of this file, which stays open as long as they are held."""
        return Extent(self.path, self._descriptor, offset, length, self)

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill ``out``, C-contiguous of any type, with the bytes from ``offset``.

        Raises
        ------
        DataError
            The file ends early or cannot be read.
        """
        read_extent(self.extent(offset, out.nbytes), as_bytes(out))

    def read_uncached(self, offset: int, out: np.ndarray) -> str | None:
        """As `read_into`, and leaves nothing in the page cache: with ``O_DIRECT``, or by dropping it afterwards.

        Gives the reason where the file system refuses ``O_DIRECT``.
        """
        target, descriptor = as_bytes(out), self._open_direct()
        if descriptor is not None:
            try:
                done = fill_direct(descriptor, offset, target)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise read_failed(self.extent(offset, out.nbytes), 0, error) from error
                self._refused = str(error.strerror)
            else:
                if done < len(target):
                    # The file's end, most likely; who reads the usual way finds out, and says so.
                    self.read_into(offset + done, target[done:])
                return None
        self.read_into(offset, out)
        forget(self.extent(offset, out.nbytes))
        return f"{self.path}: O_DIRECT is refused ({self._refused}); read through the page cache and dropped behind"

    def close(self) -> None:
        """Close the descriptors; later reads are a DataError."""
        # The numbers may be given to other files: never read through them again.
        self._descriptor = -1
        self._finalizer()
        with self._lock:
            self._direct, self._refused = None, "closed"

    def _open_direct(self) -> int | None:
        """A descriptor with ``O_DIRECT``, opened when it is first asked for; None where that is refused."""
        with self._lock:
            if self._direct is None and self._refused is None:
                try:
                    descriptor = _open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError as error:
                    self._refused = str(error.strerror)
                    return None
                if not os.path.sameopenfile(descriptor, self._descriptor):
                    os.close(descriptor)
                    raise DataError(f"{self.path}: was replaced while it was being read; start again")
                self._direct = descriptor
                self._finalizer.detach()
                self._finalizer = weakref.finalize(self, _close, self._descriptor, descriptor)
            return None if self._refused is not None else self._direct


def as_bytes(out: np.ndarray) -> np.ndarray:
    """The bytes of a C-contiguous array of any type, uint8, in the same memory."""
    if not out.flags.c_contiguous:
        raise ValueError("out must be C-contiguous")
    return out.reshape(-1).view(np.uint8)


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


def _open(path: str, flags: int) -> int:
    """`os.open`, with this process's limit on open files raised to what it may be where that is in the way."""
    try:
        return os.open(path, flags)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return os.open(path, flags)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
