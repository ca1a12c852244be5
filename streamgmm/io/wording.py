"""Parts of messages."""

from __future__ import annotations

from collections.abc import Sequence

NAMES_LISTED = 8


def listed(names: Sequence[str]) -> str:
    """The first of ``names``."""
    return (", ".join(map(repr, names[:NAMES_LISTED])) + (", …" if len(names) > NAMES_LISTED else "")) or "none"


def reason_of(error: BaseException) -> str:
    """A library's error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
