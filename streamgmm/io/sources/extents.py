"""Rows that are bytes of files as they are: where they lie, and reading them straight into place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from crc32c import crc32c

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.base import Rows, Source
from streamgmm.io.sources.raw import as_bytes

CHECKSUM_BYTES = 4
"""A CRC-32C, little-endian, behind the bytes that it covers."""

RUN_BYTES = 16 << 20
"""Of an object whose chunks have checksums: what one request reads at most."""


class ByteFile(Protocol):
    """A file, or an object in a store: `RawFile`, `RemoteFile`."""

    path: str
    size: int

    def read_into(self, offset: int, out: np.ndarray) -> None: ...

    def read_uncached(self, offset: int, out: np.ndarray) -> str | None: ...

    def extent(self, offset: int, length: int) -> Extent | None: ...


@dataclass(frozen=True)
class Placement:
    """Bytes [offset, offset + length) of a file, and the byte of the caller's buffer where they go.

    Attributes
    ----------
    checked : (int, int) or None
        Offset and length of the bytes around them that one `CHECKSUM_BYTES` checksum covers.
    """

    file: ByteFile
    offset: int
    length: int
    destination: int
    checked: tuple[int, int] | None = None

    def follows(self, other: Placement) -> bool:
        """Whether one read can fill both, ``other`` first."""
        return (
            self.checked is other.checked is None
            and self.file is other.file
            and self.offset == other.offset + other.length
            and self.destination == other.destination + other.length
        )


class ExtentSource(Source):
    """A source that says where its rows lie; or, with ``read_path`` set to ``decode``, how they are decoded.

    ``read_path`` is ``objects`` where they lie in an object store.
    """

    read_path = "extents"

    @abstractmethod
    def placements(self, start: int, stop: int) -> Iterable[Placement]:
        """Where rows [start, stop) lie, in order; destinations count from row ``start``."""

    def decode_into(self, start: int, stop: int, out: Rows) -> None:
        """As `read_into`, for data that turned out not to lie in its file as rows."""
        raise NotImplementedError

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        if self.read_path != "decode":
            self._read_placements(start, stop, out, uncached=False)
        elif start < stop:
            self.decode_into(start, stop, out)

    def read_uncached(self, start: int, stop: int, out: Rows) -> str | None:
        if self.read_path != "decode":
            return self._read_placements(start, stop, out, uncached=True)
        return super().read_uncached(start, stop, out)

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        for placement in joined(self.placements(start, stop)):
            extent = placement.file.extent(placement.offset, placement.length)
            if extent is not None:
                yield extent

    @property
    def stored_bytes(self) -> int:
        if self.read_path != "extents":
            return super().stored_bytes
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def _read_placements(self, start: int, stop: int, out: Rows, *, uncached: bool) -> str | None:
        target, word = as_bytes(out), None
        if self.read_path == "objects":
            for run in runs(self.placements(start, stop)):
                _read_run(run, target)
            return None
        for placement in joined(self.placements(start, stop)):
            part = target[placement.destination : placement.destination + placement.length]
            read = _read_checked if placement.checked else _read_plain
            word = read(placement, part, uncached) or word
        return word


def joined(placements: Iterable[Placement]) -> Iterator[Placement]:
    """``placements`` with neighbours in file and buffer made one."""
    latest: Placement | None = None
    for placement in placements:
        if latest is not None and placement.follows(latest):
            latest = Placement(latest.file, latest.offset, latest.length + placement.length, latest.destination)
            continue
        if latest is not None:
            yield latest
        latest = placement
    if latest is not None:
        yield latest


def runs(placements: Iterable[Placement]) -> Iterator[list[Placement]]:
    """``placements`` in groups that one request of at most `RUN_BYTES` reads: neighbours of one object."""
    run: list[Placement] = []
    for placement in placements:
        first, end = _stored(placement)
        if run and not (
            placement.file is run[-1].file and first == _stored(run[-1])[1] and end - _stored(run[0])[0] <= RUN_BYTES
        ):
            yield run
            run = []
        run.append(placement)
    if run:
        yield run


def _stored(placement: Placement) -> tuple[int, int]:
    """The bytes that must be read for a placement: first and one past the last."""
    if placement.checked is None:
        return placement.offset, placement.offset + placement.length
    offset, length = placement.checked
    return offset, offset + length + CHECKSUM_BYTES


def _read_run(run: list[Placement], target: np.ndarray) -> None:
    """Read neighbours at once, each compared with its checksum where it has one. Raises DataError as `_compare`."""
    first, file = _stored(run[0])[0], run[0].file
    if len(run) == 1 and run[0].checked is None:
        file.read_into(first, target[run[0].destination : run[0].destination + run[0].length])
        return
    whole: np.ndarray = np.empty(_stored(run[-1])[1] - first, np.uint8)
    file.read_into(first, whole)
    for placement in run:
        if placement.checked is not None:
            begin, length = placement.checked
            tail = begin + length - first
            _compare(placement, whole[begin - first : tail], whole[tail : tail + CHECKSUM_BYTES])
        at = placement.offset - first
        target[placement.destination : placement.destination + placement.length] = whole[at : at + placement.length]


def _read_plain(placement: Placement, out: np.ndarray, uncached: bool) -> str | None:
    if uncached:
        return placement.file.read_uncached(placement.offset, out)
    placement.file.read_into(placement.offset, out)
    return None


def _read_checked(placement: Placement, out: np.ndarray, uncached: bool) -> str | None:
    """Read a placement whose surroundings have a checksum, and compare it. Raises DataError as `_compare`."""
    assert placement.checked is not None
    offset, length = placement.checked
    word, covered = None, out
    tail: np.ndarray = np.empty(CHECKSUM_BYTES, np.uint8)
    if placement.length == length and not uncached:
        placement.file.read_into(offset, out)
        placement.file.read_into(offset + length, tail)
    else:
        # One read for bytes and checksum: a device without a cache would be asked for the same block twice.
        whole: np.ndarray = np.empty(length + CHECKSUM_BYTES, np.uint8)
        if uncached:
            word = placement.file.read_uncached(offset, whole)
        else:
            placement.file.read_into(offset, whole)
        covered, tail = whole[:length], whole[length:]
        first = placement.offset - offset
        out[:] = covered[first : first + placement.length]
    _compare(placement, covered, tail)
    return word


def _compare(placement: Placement, covered: np.ndarray, tail: np.ndarray) -> None:
    """Compare bytes with their checksum.

    Raises
    ------
    DataError
        It differs; the message names file and offset.
    """
    assert placement.checked is not None
    offset, length = placement.checked
    if crc32c(np.ascontiguousarray(covered).data) != int.from_bytes(tail.tobytes(), "little"):
        raise DataError(
            f"{placement.file.path}: bytes {offset} to {offset + length - 1} fail their checksum (crc32c), "
            "they are damaged; restore it or write it again"
        )
