"""Trying again, after longer and longer waits, a bounded number of times."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How often something is tried, and how long to wait in between: twice as long each time.

    Attributes
    ----------
    tries : int
    first, longest : float
        Seconds before the second try, and at most before any.
    sleep : callable
        What waits.
    """

    tries: int = 6
    first: float = 0.25
    longest: float = 10.0
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep

    def waits(self) -> list[float]:
        """Seconds before each further try."""
        return [min(self.longest, self.first * 2.0**i) for i in range(self.tries - 1)]


class GaveUpError(Exception):
    """Every try failed; the last error is the cause."""


async def patiently(
    work: Callable[[], Awaitable[Result]], patience: Patience, final: Callable[[Exception], bool]
) -> Result:
    """What ``work`` gives, tried again where it fails for a reason that may pass; a ``final`` one is raised at once.

    Raises
    ------
    GaveUpError
    """
    for wait in [*patience.waits(), None]:
        try:
            return await work()
        except Exception as error:
            if final(error):
                raise
            if wait is None:
                raise GaveUpError(f"failed {patience.tries} times") from error
        await patience.sleep(wait)
    raise AssertionError("unreachable")
