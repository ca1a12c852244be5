"""Checksums that tell whether rows changed between one pass and another.

CRC-32C of every 256 rows, folded in row order into one number a segment. Chunks end at multiples of 256 rows, so the
number does not depend on how the rows were cut.
"""

from __future__ import annotations

import google_crc32c

from streamgmm.io.sources.base import Rows

UNIT_ROWS = 256
"""Divides every chunk but the last."""

UNIT_BYTES = 4
"""Of a unit's checksum."""


def unit_checksums(rows: Rows) -> bytes:
    """CRC-32C of each `UNIT_ROWS` rows (n, D), four little-endian bytes each."""
    units = (rows[start : start + UNIT_ROWS].tobytes() for start in range(0, len(rows), UNIT_ROWS))
    return b"".join(google_crc32c.value(unit).to_bytes(UNIT_BYTES, "little") for unit in units)


def fold(checksum: int, units: bytes) -> int:
    """The checksum of a segment after more of its units; a segment begins with 0."""
    return int(google_crc32c.extend(checksum, units))
