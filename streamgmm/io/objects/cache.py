"""Objects kept in a local folder of bounded size.

What came first stays. A pass reads objects in the same order again and again, and a cache that evicts what was least
recently used would have thrown away each one just before it is wanted: it would hit nothing. One that keeps the first
that came hits its share of the data on every pass. Only other data sets, which nobody reads now, make room, the one
that was opened longest ago first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from streamgmm.errors import RequestError

_LOCK = ".lock"
_PART = ".part"


@dataclass(frozen=True)
class Cache:
    """Where objects may be kept, and how many bytes of them; several processes may share it."""

    folder: Path
    limit: int


class Shelf:
    """The part of a cache that belongs to one data set. It is in use as long as this object lives.

    Parameters
    ----------
    cache : Cache
    url : str
        Of the data set.

    Raises
    ------
    RequestError
        The folder cannot be used.
    """

    def __init__(self, cache: Cache, url: str) -> None:
        self._cache = cache
        self.path = cache.folder / hashlib.sha256(url.encode()).hexdigest()[:16]
        try:
            with self._all_locked():
                self.path.mkdir(exist_ok=True)
                self._in_use = _locked(self.path / _LOCK, fcntl.LOCK_SH)
            os.utime(self.path / _LOCK)
        except OSError as error:
            raise RequestError(f"{cache.folder}: cannot be a cache ({error.strerror}); name another folder") from None

    def close(self) -> None:
        """Let others make room here."""
        if self._in_use >= 0:
            os.close(self._in_use)
            self._in_use = -1

    def name(self, key: str, tag: str, size: int) -> str:
        """The file of an object; of another version of it, another file."""
        return hashlib.sha256(f"{key}|{tag}|{size}".encode()).hexdigest()[:32]

    def keep(self, names: Collection[str]) -> None:
        """Drop all but ``names``: versions of objects that are no more."""
        for entry in self.path.iterdir():
            if entry.name != _LOCK and entry.name.removesuffix(_PART) not in names:
                entry.unlink(missing_ok=True)

    def find(self, name: str, size: int) -> Path | None:
        """The file of an object that is here, whole."""
        path = self.path / name
        try:
            return path if path.stat().st_size == size else None
        except OSError:
            return None

    @contextmanager
    def room(self, name: str, size: int) -> Iterator[int | None]:
        """A descriptor to write an object of ``size`` bytes to, which is here when all goes well; None for no room, or
        where another process is about to write it.
        """
        part = self.path / f"{name}{_PART}"
        descriptor = self._reserved(part, size)
        if descriptor is None:
            yield None
            return
        try:
            yield descriptor
            os.fsync(descriptor)
            part.replace(self.path / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _reserved(self, part: Path, size: int) -> int | None:
        with self._all_locked():
            try:
                descriptor = _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            # A file of a killed process counts as if it were empty.
            os.truncate(descriptor, 0)
            if self._used() + size > self._cache.limit:
                self._make_room(size)
            if self._used() + size > self._cache.limit:
                part.unlink()
                os.close(descriptor)
                return None
            # Counted in full from now on, though the disk has given nothing yet.
            os.truncate(descriptor, size)
            return descriptor

    def _used(self) -> int:
        return sum(_size(entry) for shelf in self._shelves() for entry in shelf.iterdir())

    def _shelves(self) -> list[Path]:
        found = [entry for entry in self._cache.folder.iterdir() if entry.is_dir()]
        return sorted(found, key=lambda shelf: _time(shelf / _LOCK))

    def _make_room(self, size: int) -> None:
        for shelf in self._shelves():
            if self._used() + size <= self._cache.limit:
                return
            with suppress(OSError):
                descriptor = _locked(shelf / _LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(shelf, ignore_errors=True)
                os.close(descriptor)

    @contextmanager
    def _all_locked(self) -> Iterator[None]:
        self._cache.folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(self._cache.folder / _LOCK, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(descriptor)


def _locked(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
