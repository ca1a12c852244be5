"""Which components a run found empty or degenerate, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trouble:
    """One component's trouble.

    Attributes
    ----------
    what : str
        The name of the history's field: ``empty``, ``degenerate``, or what else lists components.
    component : int
    iterations : tuple of int
        Ascending.
    lasting : bool
        Still so in the last iteration.
    """

    what: str
    component: int
    iterations: tuple[int, ...]
    lasting: bool


def troubles(history: Sequence[Mapping[str, Any]]) -> list[Trouble]:
    """Every trouble in one candidate's history: those that last first, then by their number of iterations."""
    seen: dict[tuple[str, int], list[int]] = {}
    for record in history:
        for what, components in record.items():
            for component in components if isinstance(components, list) else ():
                if isinstance(component, int):
                    seen.setdefault((what, component), []).append(int(record["iteration"]))
    last = int(history[-1]["iteration"]) if history else 0
    found = [
        Trouble(what, component, tuple(iterations), iterations[-1] == last)
        for (what, component), iterations in seen.items()
    ]
    return sorted(found, key=lambda t: (not t.lasting, -len(t.iterations), t.what, t.component))


def as_ranges(numbers: Sequence[int]) -> str:
    """``(1, 2, 3, 7)`` as ``1–3, 7``; at most six pieces."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    told = [str(a) if a == b else f"{a}–{b}" for a, b in pieces[:6]]
    return ", ".join(told) + (", …" if len(pieces) > 6 else "")
