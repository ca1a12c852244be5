"""Bytes as people write them."""

from __future__ import annotations

import re

from streamgmm.errors import RequestError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: str | int, name: str = "memory") -> int:
    """``'4GiB'``, ``'512 MB'`` or a number of bytes as an int of at least 1."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]i?|)b?\s*", str(value).lower())
    if not match or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise RequestError(f"{name} must be a size such as 512MiB or 4GB; got {value!r}")
    return size


def format_bytes(size: float) -> str:
    """``size`` in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
