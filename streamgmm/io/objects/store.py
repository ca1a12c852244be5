"""A view of an object store that is patient, knows what is there, and keeps some of it here."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.buffer.cpu import buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ObjectStore, WrapperStore

from streamgmm.errors import DataError
from streamgmm.io.objects.cache import Cache, Shelf
from streamgmm.io.objects.patience import GaveUpError, Patience, patiently
from streamgmm.io.objects.urls import WEB, scheme_of
from streamgmm.io.plan import Extent
from streamgmm.io.sources.raw import as_bytes
from streamgmm.io.wording import reason_of

Result = TypeVar("Result")

PATIENCE = Patience()

RANGE_BYTES = 16 << 20
"""What is asked for at once, at most: a request is tried again as a whole."""

_FINAL = ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError", "InvalidPathError")
"""obstore's errors that no further try mends."""


class RemoteStore(WrapperStore[Store]):
    """Objects below ``url``.

    Every request is tried as `PATIENCE` says. With a `Cache` whole objects are fetched as long as there is room, and
    read from there ever after.

    Raises
    ------
    DataError
        The store does not answer, or refuses; raised by every method.
    """

    def __init__(self, store: Store, url: str, cache: Cache | None = None) -> None:
        super().__init__(store)
        self.url = url.rstrip("/")
        # A web server has no way to list what it holds.
        self._lists = store.supports_listing and scheme_of(url) not in WEB
        self._known: dict[str, tuple[int, str]] = {}
        self._shelf = None if cache is None else Shelf(cache, self.url)
        self._fetching: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def supports_listing(self) -> bool:
        return self._lists

    def close(self) -> None:
        if self._shelf is not None:
            self._shelf.close()

    def survey(self, prefix: str) -> object:
        """Note size and version of every object below ``prefix``; gives a digest of them, None where none are listed.

        Objects of other versions are dropped from the cache.
        """
        if not self._lists:
            return None
        self._known = sync(self._listed(prefix))
        if self._shelf is not None:
            self._shelf.keep({self._shelf.name(key, tag, size) for key, (size, tag) in self._known.items()})
        facts = sorted((key.removeprefix(prefix), *about) for key, about in self._known.items())
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    async def getsize(self, key: str) -> int:
        return (await self._about(key))[0]

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._known or await self._listed(prefix):
            if key.startswith(prefix):
                yield key

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if self._shelf is not None and (not self._lists or key in self._known) and not key.endswith(_METADATA):
            size, tag = await self._about(key)
            path = await self._here(key, size, tag)
            if path is not None:
                raw = await asyncio.to_thread(_read, path, *_bounds(byte_range, size))
                return prototype.buffer.from_bytes(raw)
        return await self._patiently(key, lambda: self._store.get(key, prototype, byte_range))

    async def _here(self, key: str, size: int, tag: str) -> Path | None:
        """The object's file in the cache, fetched now where there is room for it."""
        assert self._shelf is not None
        name = self._shelf.name(key, tag, size)
        async with self._fetching[key]:
            found = self._shelf.find(name, size)
            if found is not None:
                return found
            try:
                with self._shelf.room(name, size) as descriptor:
                    if descriptor is None:
                        return None
                    for start in range(0, size, RANGE_BYTES):
                        part = RangeByteRequest(start, min(start + RANGE_BYTES, size))
                        raw = await self._patiently(key, partial(self._store.get, key, buffer_prototype, part))
                        if raw is None or len(raw) < part.end - part.start:
                            raise DataError(f"{self.url}/{key}: is truncated: less than {size} bytes; restore it")
                        await asyncio.to_thread(_write, descriptor, raw.to_bytes(), start)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                return None  # a full disk is no reason to stop
            return self._shelf.find(name, size)

    async def _about(self, key: str) -> tuple[int, str]:
        """Size and version. Raises FileNotFoundError where there is no such object."""
        if key not in self._known:
            self._known[key] = await self._patiently(key, lambda: self._head(key))
        return self._known[key]

    async def _head(self, key: str) -> tuple[int, str]:
        if not isinstance(self._store, ObjectStore):
            return await self._store.getsize(key), ""
        import obstore

        return _described(await obstore.head_async(self._store.store, key))

    async def _listed(self, prefix: str) -> dict[str, tuple[int, str]]:
        return await self._patiently(prefix, lambda: self._list(prefix))

    async def _list(self, prefix: str) -> dict[str, tuple[int, str]]:
        if not isinstance(self._store, ObjectStore):
            keys = [key async for key in self._store.list_prefix(prefix)]
            return {key: (await self._store.getsize(key), "") for key in keys}
        import obstore

        found = {}
        async for batch in obstore.list(self._store.store, prefix=prefix.rstrip("/") or None):
            found.update({each["path"]: _described(each) for each in batch})
        return found

    async def _patiently(self, key: str, work: Callable[[], Awaitable[Result]]) -> Result:
        try:
            return await patiently(work, PATIENCE, _is_final)
        except GaveUpError as error:
            raise DataError(
                f"{self.url}/{key}: {error} ({reason_of(error.__cause__ or error)[:160]}); check the store and the "
                "network, and run the same command again"
            ) from error
        except Exception as error:
            if type(error).__name__ in _FINAL:
                raise DataError(
                    f"{self.url}/{key}: is refused ({reason_of(error)[:160]}); check credentials"
                ) from error
            raise


class RemoteFile:
    """One object, read at any offset by any thread: what `streamgmm.io.sources.raw.RawFile` is for a file.

    Attributes
    ----------
    path : str
        Its address.
    size : int
        Bytes.

    Raises
    ------
    FileNotFoundError
        There is no such object.
    """

    def __init__(self, store: RemoteStore, key: str) -> None:
        self.path = f"{store.url}/{key}"
        self._store, self._key = store, key
        self.size = sync(store.getsize(key))

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill ``out``, C-contiguous of any type, with the bytes from ``offset``.

        Raises
        ------
        DataError
            The object ends early or cannot be read.
        """
        target = as_bytes(out)
        for start in range(0, len(target), RANGE_BYTES):
            part = target[start : start + RANGE_BYTES]
            begin = offset + start
            raw = sync(self._store.get(self._key, buffer_prototype, RangeByteRequest(begin, begin + len(part))))
            if raw is None or len(raw) != len(part):
                ends = "is missing" if raw is None else f"ends at byte {begin + len(raw)}"
                raise DataError(f"{self.path}: {ends}, where {self.size} bytes were promised; restore it")
            part[:] = np.frombuffer(raw.to_bytes(), np.uint8)

    def read_uncached(self, offset: int, out: np.ndarray) -> str | None:
        """As `read_into`: what is read from a store leaves nothing in the page cache."""
        self.read_into(offset, out)
        return None

    def extent(self, offset: int, length: int) -> Extent | None:
        """None: it is in no file."""
        return None


_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


def _described(meta: Any) -> tuple[int, str]:
    return int(meta["size"]), str(meta.get("e_tag") or meta.get("last_modified") or "")


def _is_final(error: Exception) -> bool:
    return isinstance(error, (FileNotFoundError, DataError, MemoryError)) or type(error).__name__ in _FINAL


def _bounds(wanted: ByteRequest | None, size: int) -> tuple[int, int]:
    if isinstance(wanted, RangeByteRequest):
        return wanted.start, min(wanted.end, size)
    if isinstance(wanted, OffsetByteRequest):
        return wanted.offset, size
    return (max(0, size - wanted.suffix), size) if isinstance(wanted, SuffixByteRequest) else (0, size)


def _read(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(max(0, stop - start)) or b""


def _write(descriptor: int, raw: bytes, offset: int) -> None:
    view = memoryview(raw)
    while len(view):
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
