from __future__ import annotations

import asyncio

import pytest

from streamgmm.io.objects.patience import GaveUpError, Patience, patiently


def run(outcomes, tries=5):
    """The result, and what was waited, of work that has these outcomes one after the other."""
    waited, left = [], list(outcomes)

    async def note(seconds):
        waited.append(seconds)

    async def work():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    patience = Patience(tries, first=1.0, longest=3.0, sleep=note)
    final = lambda error: isinstance(error, KeyError)  # noqa: E731
    return asyncio.run(patiently(work, patience, final)), waited


def test_waits_grow_up_to_a_bound():
    assert run([OSError(), OSError(), OSError(), OSError(), 7]) == (7, [1.0, 2.0, 3.0, 3.0])
    assert run([7]) == (7, [])


def test_it_gives_up():
    with pytest.raises(GaveUpError, match="failed 2 times") as gave_up:
        run([OSError("a"), OSError("b")], tries=2)
    assert str(gave_up.value.__cause__) == "b"


def test_what_no_try_mends_is_raised_at_once():
    with pytest.raises(KeyError):
        run([KeyError(), 7])
