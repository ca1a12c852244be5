# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that takes the best of the groups' winners of one row.

One warp has a row: whole numbers are then reduced by one instruction, and nothing waits at a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOBODY = tl.constexpr(2**31 - 1)
INFINITE = tl.constexpr(0x7F800000)
"""Keys from here on are of no score: infinity, or not a number."""


@triton.jit
def keys(winners, place, live):
    """The smaller, the better: scores are below zero, so that their bits without the sign are in order.

    Their low bits are the member's number (`scoring`). `NOBODY` where not ``live``.
    """
    bits = tl.load(winners + place, mask=live, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(live, bits & NOBODY, NOBODY)


@triton.jit
def keys_of(winners, group, groups, PLACES: tl.constexpr, KEEP: tl.constexpr):
    """`keys` of each ``group``'s best and, with KEEP 2, of what follows it."""
    place = group // PLACES * (KEEP * PLACES) + group % PLACES
    key = keys(winners, place, group < groups)
    following = keys(winners, place + PLACES, group < groups) if KEEP == 2 else key
    return key, following


@triton.jit
def best_of(
    key, following, group, groups, chosen_key, chosen,
    KEEP: tl.constexpr, MASK: tl.constexpr, SCRAMBLE: tl.constexpr, MEMBER_BITS: tl.constexpr, FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The SLOTS best of some groups and, unless FIRST, of those chosen before; the lower index of equal ones.

    ``key`` is the best of each group, and ``following`` what is the best when that is taken.
    """
    slot = tl.arange(0, SLOTS)
    new_key = tl.full([SLOTS], NOBODY, tl.int32)
    new = tl.full([SLOTS], NOBODY, tl.int32)
    for turn in range(SLOTS):
        best = tl.min(key, axis=0)
        if not FIRST:
            best = tl.minimum(best, tl.min(chosen_key, axis=0))
        # Equal keys are of one member, and then the lower index is the lower of these; see `Grouping`.
        member = best & ((1 << MEMBER_BITS) - 1)
        turned = (member * SCRAMBLE >> 4) & MASK
        place = tl.min(tl.where(key == best, group ^ turned, NOBODY), axis=0)
        if FIRST:
            one = member * groups + place
        else:
            one = tl.where(place == NOBODY, NOBODY, member * groups + place)
            one = tl.minimum(one, tl.min(tl.where(chosen_key == best, chosen, NOBODY), axis=0))
            place = one - member * groups
            chosen_key = tl.where(chosen == one, NOBODY, chosen_key)
        taken = (group == (place ^ turned)) & (key == best)
        if KEEP == 2:
            key = tl.where(taken, following, key)
            following = tl.where(taken, NOBODY, following)
        else:
            key = tl.where(taken, NOBODY, key)
        new_key = tl.where(slot == turn, best, new_key)
        new = tl.where(slot == turn, tl.where(best >= INFINITE, NOBODY, one), new)
    return new_key, new


@triton.jit
def select(
    winners, groups,
    PLACES: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr, SCRAMBLE: tl.constexpr, MEMBER_BITS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """(SLOTS,) int32: the best of a row's ``winners``, best first; from K on where there is none."""
    chosen_key = tl.full([SLOTS], NOBODY, tl.int32)
    chosen = tl.full([SLOTS], NOBODY, tl.int32)
    if ONE_BLOCK:
        group = tl.arange(0, BLOCK)
        key, following = keys_of(winners, group, groups, PLACES, KEEP)
        chosen_key, chosen = best_of(
            key, following, group, groups, chosen_key, chosen, KEEP, MASK, SCRAMBLE, MEMBER_BITS, True, SLOTS
        )  # fmt: skip
    else:
        for first in range(0, groups, BLOCK):
            group = first + tl.arange(0, BLOCK)
            key, following = keys_of(winners, group, groups, PLACES, KEEP)
            chosen_key, chosen = best_of(
                key, following, group, groups, chosen_key, chosen, KEEP, MASK, SCRAMBLE, MEMBER_BITS, False, SLOTS
            )  # fmt: skip
    return chosen
