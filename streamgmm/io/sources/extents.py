"""Rows that are bytes of files as they are: where they lie, and reading them straight into place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import google_crc32c
import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.base import Rows, Source
from streamgmm.io.sources.raw import RawFile, as_bytes

CHECKSUM_BYTES = 4
"""A CRC-32C, little-endian, behind the bytes that it covers."""

ReadFile: TypeAlias = Callable[[RawFile, int, np.ndarray], str | None]


@dataclass(frozen=True)
class Placement:
    """Bytes [offset, offset + length) of a file, and the byte of the caller's buffer where they go.

    Attributes
    ----------
    checked : (int, int) or None
        Offset and length of the bytes around them that one `CHECKSUM_BYTES` checksum covers.
    """

    file: RawFile
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
    """A source that says where its rows lie; or, with ``read_path`` set to ``decode``, how they are decoded."""

    read_path = "extents"

    @abstractmethod
    def placements(self, start: int, stop: int) -> Iterable[Placement]:
        """Where rows [start, stop) lie, in order; destinations count from row ``start``."""

    def decode_into(self, start: int, stop: int, out: Rows) -> None:
        """As `read_into`, for data that turned out not to lie in its file as rows."""
        raise NotImplementedError

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        if self.read_path == "extents":
            self._read_placements(start, stop, out, RawFile.read_into)
        elif start < stop:
            self.decode_into(start, stop, out)

    def read_uncached(self, start: int, stop: int, out: Rows) -> str | None:
        if self.read_path == "extents":
            return self._read_placements(start, stop, out, RawFile.read_uncached)
        return super().read_uncached(start, stop, out)

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        for placement in joined(self.placements(start, stop)):
            yield placement.file.extent(placement.offset, placement.length)

    @property
    def stored_bytes(self) -> int:
        if self.read_path != "extents":
            return super().stored_bytes
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def _read_placements(self, start: int, stop: int, out: Rows, read: ReadFile) -> str | None:
        target, word = as_bytes(out), None
        for placement in joined(self.placements(start, stop)):
            part = target[placement.destination : placement.destination + placement.length]
            told = _read_checked(placement, part, read) if placement.checked else read(
                placement.file, placement.offset, part
            )  # fmt: skip
            word = word or told
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


def _read_checked(placement: Placement, out: np.ndarray, read: ReadFile) -> str | None:
    """Read a placement whose surroundings have a checksum, and compare it.

    Raises
    ------
    DataError
        The checksum differs; the message names file and offset.
    """
    assert placement.checked is not None
    offset, length = placement.checked
    tail: np.ndarray = np.empty(CHECKSUM_BYTES, np.uint8)
    if placement.length == length and read is RawFile.read_into:
        word, covered = read(placement.file, offset, out), out
        read(placement.file, offset + length, tail)
    else:
        # One read for bytes and checksum: a device without a cache would be asked for the same block twice.
        whole: np.ndarray = np.empty(length + CHECKSUM_BYTES, np.uint8)
        word = read(placement.file, offset, whole)
        covered, tail = whole[:length], whole[length:]
        first = placement.offset - offset
        out[:] = covered[first : first + placement.length]
    if google_crc32c.value(covered) != int.from_bytes(tail.tobytes(), "little"):
        raise DataError(
            f"{placement.file.path}: bytes {offset} to {offset + length - 1} fail their checksum (crc32c), "
            "they are damaged; restore it or write it again"
        )
    return word
