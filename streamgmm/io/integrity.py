"""Checksums that tell whether rows changed between one pass and another.

CRC-32C of every 256 rows, folded in row order into one number a segment. Chunks end at multiples of 256 rows, so the
number does not depend on how the rows were cut.
"""

from __future__ import annotations

import numpy as np
from crc32c import crc32c

from streamgmm.io.sources.base import Rows

UNIT_ROWS = 256
"""Divides every chunk but the last."""

UNIT_BYTES = 4
"""Of a unit's checksum."""


def unit_checksums(rows: Rows) -> bytes:
    """CRC-32C of each `UNIT_ROWS` rows (n, D), four little-endian bytes each."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data
    size = UNIT_ROWS * rows.shape[1] * rows.itemsize
    units = (raw[start : start + size] for start in range(0, len(raw), size))
    return b"".join(crc32c(unit).to_bytes(UNIT_BYTES, "little") for unit in units)


def fold(checksum: int, units: bytes) -> int:
    """The checksum of a segment after more of its units; a segment begins with 0."""
    return crc32c(units, checksum)
