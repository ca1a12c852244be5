"""Which way a data set takes, what that costs, and what converting it would gain: for a person."""

from __future__ import annotations

from streamgmm.io.ceilings import cache_rate, sample_extents, source_rate
from streamgmm.io.sources.base import Source
from streamgmm.units import format_bytes

_PROBE_SECONDS = 0.5
_PROBE_THREADS = 2
_WORTH = 1.5
"""Converting is advised where it makes reading so many times as fast."""


def describe_reading(source: Source) -> dict[str, str]:
    """``read_path``, ``read_cost`` and ``advice``; the latter two are sentences.

    Data that must be decoded is read for about a second, to tell how fast that goes here.
    """
    return {"read_path": source.read_path, **(_decoded(source) if source.read_path == "decode" else _plain(source))}


def _plain(source: Source) -> dict[str, str]:
    size = format_bytes(_row_bytes(source) * source.shape[0])
    if source.read_path == "memory":
        return {"read_cost": f"{size} a pass, copied from memory", "advice": "none: it is in memory already"}
    if source.read_path == "objects":
        return {
            "read_cost": f"{size} a pass, in ranges of objects",
            "advice": "keep what fits of it here with --cache DIR, if it is passed over more than once",
        }
    checked = " in whole chunks, for their checksums" if source.read_granule > 1 else ""
    return {
        "read_cost": f"{size} a pass, read straight into place{checked}",
        "advice": "none: no other format is read faster",
    }


def _decoded(source: Source) -> dict[str, str]:
    stored, size = source.stored_bytes, _row_bytes(source) * source.shape[0]
    rate = source_rate(source, _PROBE_THREADS, _PROBE_SECONDS)
    whence = f"{format_bytes(stored)} of files decoded to {format_bytes(size)}" if stored else format_bytes(size)
    because = f" because {source.slow_because}" if source.slow_because else ""
    cost = f"{whence} a pass{because}; {rate / 1e9:.2f} GB/s here with {_PROBE_THREADS} threads"
    extents = sample_extents(source)
    if not extents:
        return {
            "read_cost": cost,
            "advice": "write it to Zarr once, with streamgmm prepare, if it is passed over more than a few times",
        }
    raw = cache_rate(extents, _PROBE_THREADS, _PROBE_SECONDS)
    if raw < _WORTH * rate:
        return {"read_cost": cost, "advice": "none: uncompressed data would be read hardly faster"}
    room = f"; it takes {format_bytes(size)} then" + (f" instead of {format_bytes(stored)}" if stored != size else "")
    advice = (
        f"convert it once to uncompressed Zarr shards, with streamgmm prepare: {raw / rate:.1f} times as fast from the "
        f"page cache ({raw / 1e9:.1f} GB/s){room}"
    )
    return {"read_cost": cost, "advice": advice}


def _row_bytes(source: Source) -> int:
    return source.shape[1] * source.dtype.itemsize
