"""A permutation of n numbers that is computed, never stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from streamgmm.transforms import granules

_ROUNDS = 8
_AT_ONCE = 1 << 14

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random bijection of 0 … n − 1, the same for the same seed.

    A Feistel network over just enough bits (Luby & Rackoff 1988); numbers that land beyond n are sent through it again
    until they land inside, which keeps it a bijection (Black & Rogaway 2002, "cycle walking"). Either direction costs
    less than two trips on average, so rows find their places, and places their rows, without a table of n entries.
    """

    n: int
    seed: int

    @cached_property
    def _bits(self) -> tuple[int, int]:
        """Bits of the left and the right half."""
        bits = max(2, (self.n - 1).bit_length())
        return bits - bits // 2, bits // 2

    @cached_property
    def _keys(self) -> list[np.uint64]:
        return list(np.random.SeedSequence([self.seed, self.n]).generate_state(_ROUNDS, np.uint64))

    def forward(self, numbers: Numbers) -> Numbers:
        """Where each of ``numbers`` goes."""
        return self._walk(numbers, list(range(_ROUNDS)))

    def inverse(self, numbers: Numbers) -> Numbers:
        """What goes to each of ``numbers``."""
        return self._walk(numbers, list(reversed(range(_ROUNDS))))

    def _walk(self, numbers: Numbers, rounds: list[int]) -> Numbers:
        out = np.empty_like(numbers)
        # What works on a few thousand numbers at once stays in the cache.
        for part in granules(len(numbers), _AT_ONCE):
            out[part] = self._walk_part(numbers[part], rounds)
        return out

    def _walk_part(self, numbers: Numbers, rounds: list[int]) -> Numbers:
        found = self._trip(numbers.astype(np.uint64), rounds)
        outside = np.flatnonzero(found >= np.uint64(self.n))
        while len(outside):
            found[outside] = self._trip(found[outside], rounds)
            outside = outside[found[outside] >= np.uint64(self.n)]
        return found.astype(np.int64)

    def _trip(self, numbers: NDArray[np.uint64], rounds: list[int]) -> NDArray[np.uint64]:
        """Alternately one half is changed by a function of the other: undone by the same, in reverse order."""
        (high, low), one = self._bits, np.uint64(1)
        left, right = numbers >> np.uint64(low), numbers & ((one << np.uint64(low)) - one)
        for number in rounds:
            if number % 2:
                left ^= _mixed(right, self._keys[number]) >> np.uint64(64 - high)
            else:
                right ^= _mixed(left, self._keys[number]) >> np.uint64(64 - low)
        return (left << np.uint64(low)) | right


def _mixed(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = numbers * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
