"""How many tasks may work at once within a memory limit, from what each of them holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamgmm.errors import RequestError
from streamgmm.io.sources.base import Source
from streamgmm.prepare.selection import READ_BYTES
from streamgmm.prepare.shards import CHUNK_BYTES
from streamgmm.units import format_bytes

BASE_BYTES = 96 << 20
"""Dask, its graph, and what libraries allocate once."""

_SLACK_BYTES = 8 << 20
"""A thread's stack and arena."""

RUN_BYTES = 128 << 20
"""What a task of the shuffle sorts at once, its rows' numbers counted: the larger, the fewer reads gather a shard."""

STAGING_COPIES = 3
"""Of a partition that is computed and written."""

_NUMBERS_BYTES = 64
"""A row's numbers while it is sorted or gathered: of itself, of its place, and of what they are ordered by."""


def rows_at_once(size: int, row_bytes: int, granule: int) -> int:
    """Rows that are sorted within ``size`` bytes: a number of granules."""
    return max(1, size // (row_bytes + _NUMBERS_BYTES) // granule) * granule


@dataclass(frozen=True)
class Needs:
    """Bytes that one task holds at most, by what it does."""

    reading: int
    summing: int = 0
    sorting: int = 0
    gathering: int = 0

    @classmethod
    def of(cls, source: Source, width: int, granule: int, *, full: bool) -> Needs:
        """For rows of ``source``, at most ``width`` features on their way."""
        row_bytes = source.shape[1] * source.dtype.itemsize
        raw = max(READ_BYTES, granule * row_bytes, source.read_granule * row_bytes) * 2
        # A granule in fp64: before and after a map, and two temporaries.
        reading = raw + 4 * granule * width * 8 + 2 * CHUNK_BYTES + _SLACK_BYTES
        # The sum, a granule's share of it, their sum, and the outer product between them.
        return cls(reading, summing=4 * width * width * 8 if full else 0)

    def with_shuffle(self, row_bytes: int, shard_bytes: int, n_samples: int) -> Needs:
        """The same, where prepared rows of ``row_bytes`` are sorted and gathered as well."""
        each = row_bytes + _NUMBERS_BYTES
        everything = n_samples * each
        gathering = shard_bytes // row_bytes * each
        return replace(self, sorting=min(RUN_BYTES, everything), gathering=min(gathering, everything))

    @property
    def task(self) -> int:
        """Whatever it does."""
        return self.reading + max(self.summing, self.sorting, self.gathering)


def workers_within(needs: int, memory: int, wanted: int) -> int:
    """Tasks at once: as many as are wanted and fit.

    Raises
    ------
    RequestError
        Not one fits; the message names the size that would do.
    """
    fits = (memory - BASE_BYTES) // max(1, needs)
    if fits < 1:
        raise RequestError(
            f"--memory {format_bytes(memory)} is too little: one task needs {format_bytes(needs + BASE_BYTES)}; "
            "allow that much"
        )
    return int(min(wanted, fits))
