"""An exact quantile of more numbers than memory should hold."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor

import numpy as np
from numpy.typing import NDArray

from streamgmm.io.sources.base import Source
from streamgmm.io.sources.spooled import SpooledSource

_IN_MEMORY = 1 << 20
"""Numbers that are sorted in memory: 8 MiB of them."""

_DIGIT_BITS = 16


def quantile(pieces: Iterable[np.ndarray], n: int, q: float, in_memory: int = _IN_MEMORY) -> float:
    """The ``q``-quantile of ``n`` finite numbers, interpolated between two neighbours as `numpy.quantile` does.

    At most ``in_memory`` numbers are held; more are kept in an unnamed temporary file, eight bytes each, from which
    the two neighbours are selected digit by digit. The numbers alone decide the result, not how they were cut.
    """
    if n <= in_memory:
        return float(np.quantile(np.concatenate([np.asarray(piece, np.float64) for piece in pieces]), q))
    source = SpooledSource(np.asarray(piece, np.float64)[:, None] for piece in pieces)
    try:
        position = q * (n - 1)
        lower, upper = _neighbours(source, floor(position), in_memory)
    finally:
        source.close()
    weight = position - floor(position)
    # From the nearer end, so that the ends themselves come out exactly.
    return lower + (upper - lower) * weight if weight < 0.5 else upper - (upper - lower) * (1 - weight)


def _neighbours(source: Source, rank: int, in_memory: int) -> tuple[float, float]:
    """The numbers of ``rank`` (from 0) and of the next rank (itself, if there is none) in sorted order."""
    lower = _select(source, rank, in_memory)
    not_above, above = 0, np.inf
    for column in _columns(source):
        greater = column[column > lower]
        not_above += len(column) - len(greater)
        above = min(above, greater.min(initial=np.inf))
    return lower, lower if not_above > rank + 1 or np.isinf(above) else float(above)


def _select(source: Source, rank: int, in_memory: int) -> float:
    """The number of ``rank``: radix selection, one pass for each 16 bits until the rest fits in memory."""
    prefix, known_bits = np.uint64(0), 0
    remaining = source.shape[0]
    while remaining > in_memory and known_bits < 64:
        shift = 64 - known_bits - _DIGIT_BITS
        counts: NDArray[np.int64] = np.zeros(1 << _DIGIT_BITS, np.int64)
        for column in _columns(source):
            keys = _matching(_keys(column), prefix, known_bits) >> np.uint64(shift)
            digits = (keys & np.uint64((1 << _DIGIT_BITS) - 1)).astype(np.int64)
            counts += np.bincount(digits, minlength=1 << _DIGIT_BITS)
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[digit - 1]) if digit else 0
        remaining = int(counts[digit])
        prefix = np.uint64((int(prefix) << _DIGIT_BITS) | digit)
        known_bits += _DIGIT_BITS
    if known_bits == 64:  # all that are left are equal
        return float(_values(np.array([prefix]))[0])
    rest = np.concatenate([_matching(_keys(column), prefix, known_bits) for column in _columns(source)])
    return float(_values(np.partition(rest, rank)[rank : rank + 1])[0])


def _columns(source: Source) -> Iterable[NDArray[np.float64]]:
    for rows in source.chunks(_IN_MEMORY // 4):
        yield rows[:, 0].astype(np.float64, copy=False)


def _keys(values: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Unsigned integers in the order of the numbers: the sign bit flipped, and all others of negative ones."""
    bits = (values + 0.0).view(np.uint64)  # + 0.0 makes one zero of two
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _values(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The inverse of `_keys`."""
    return np.where(keys >> np.uint64(63), keys & ~np.uint64(1 << 63), ~keys).view(np.float64)


def _matching(keys: NDArray[np.uint64], prefix: np.uint64, known_bits: int) -> NDArray[np.uint64]:
    return keys if known_bits == 0 else keys[keys >> np.uint64(64 - known_bits) == prefix]
