# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that takes the best of the groups' winners, and measures their distances in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.neighbours.narrowing import centred

NOBODY = tl.constexpr(2**31 - 1)
GONE = tl.constexpr(float("-inf"))


@triton.jit
def candidates(
    winners, place, live, n_lists, groups,
    PLACES: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr, SCRAMBLE: tl.constexpr, MEMBER_BITS: tl.constexpr,
):  # fmt: skip
    """Scores and centroids of some of each row's winners, `NOBODY` where there is none; see `Grouping`."""
    bits = tl.load(winners + place[None, :], mask=live, other=-3e38).to(tl.int32, bitcast=True)
    member = bits & ((1 << MEMBER_BITS) - 1)
    score = (bits & (-(1 << MEMBER_BITS))).to(tl.float32, bitcast=True)
    group = place // (KEEP * PLACES) * PLACES + place % PLACES
    who = member * groups + (group[None, :] ^ ((member * SCRAMBLE >> 4) & MASK))
    known = live & (who < n_lists)
    return tl.where(known, score, GONE), tl.where(known, who, NOBODY)


@triton.jit
def best_of(score, who, chosen_score, chosen, FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The SLOTS best of ``score`` and, unless FIRST, of those chosen before; the lower index of equal ones."""
    slot = tl.arange(0, SLOTS)[None, :]
    new_score = tl.full([BLOCK_ROWS, SLOTS], GONE, tl.float32)
    new = tl.full([BLOCK_ROWS, SLOTS], NOBODY, tl.int32)
    for turn in range(SLOTS):
        best = tl.max(score, axis=1)
        if not FIRST:
            best = tl.maximum(best, tl.max(chosen_score, axis=1))
        one = tl.min(tl.where(score == best[:, None], who, NOBODY), axis=1)
        if not FIRST:
            one = tl.minimum(one, tl.min(tl.where(chosen_score == best[:, None], chosen, NOBODY), axis=1))
            taken = chosen == one[:, None]
            chosen_score = tl.where(taken, GONE, chosen_score)
            chosen = tl.where(taken, NOBODY, chosen)
        taken = who == one[:, None]
        score = tl.where(taken, GONE, score)
        who = tl.where(taken, NOBODY, who)
        new_score = tl.where(slot == turn, best[:, None], new_score)
        new = tl.where(slot == turn, one[:, None], new)
    return new_score, new


@triton.jit
def residuals(rows, row, shift, points, who, d, n_rows, D: tl.constexpr):
    """x − c of some features, (rows, SLOTS, features) fp32; zero past D."""
    live = (row < n_rows)[:, None] & (d < D)[None, :]
    x = centred(rows, row, d, shift, live, D)
    c = tl.load(points + who[:, :, None].to(tl.int64) * D + d[None, None, :], mask=(d < D)[None, None, :], other=0.0)
    return x[:, None, :] - c


@triton.jit(do_not_specialize=["n_rows", "n_lists", "groups", "n_winners", "m"])
def refine(
    rows, shift, points, winners, lists, distances, inner, n_rows, n_lists, groups, n_winners, m,
    D: tl.constexpr, PLACES: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr, SCRAMBLE: tl.constexpr,
    MEMBER_BITS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The SLOTS best winners by their distances in fp32: the first m go to ``lists``, ``distances`` and ``inner``.

    ``points`` (K, D) fp32. A number that is none counts as the farthest; lists are those of centroids in any case.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    own = (row < n_rows)[:, None]
    chosen_score = tl.full([BLOCK_ROWS, SLOTS], GONE, tl.float32)
    chosen = tl.full([BLOCK_ROWS, SLOTS], NOBODY, tl.int32)
    winners += row[:, None] * n_winners
    if ONE_BLOCK:
        place = tl.arange(0, BLOCK)
        score, who = candidates(
            winners, place, own & (place < n_winners)[None, :], n_lists, groups,
            PLACES, KEEP, MASK, SCRAMBLE, MEMBER_BITS,
        )  # fmt: skip
        chosen_score, chosen = best_of(score, who, chosen_score, chosen, True, BLOCK_ROWS, SLOTS)
    else:
        for first in range(0, n_winners, BLOCK):
            place = first + tl.arange(0, BLOCK)
            score, who = candidates(
                winners, place, own & (place < n_winners)[None, :], n_lists, groups,
                PLACES, KEEP, MASK, SCRAMBLE, MEMBER_BITS,
            )  # fmt: skip
            chosen_score, chosen = best_of(score, who, chosen_score, chosen, False, BLOCK_ROWS, SLOTS)
    slot = tl.arange(0, SLOTS)[None, :]
    there = chosen < n_lists
    safe = tl.where(there, chosen, tl.minimum(slot, n_lists - 1))
    length = tl.zeros([BLOCK_ROWS, SLOTS], tl.float32)
    if BLOCK_FEATURES >= D:
        d = tl.arange(0, BLOCK_FEATURES)
        r = residuals(rows, row, shift, points, safe, d, n_rows, D)
        length += tl.sum(r * r, axis=2)
    else:
        for first in range(0, D, BLOCK_FEATURES):
            d = first + tl.arange(0, BLOCK_FEATURES)
            part = residuals(rows, row, shift, points, safe, d, n_rows, D)
            length += tl.sum(part * part, axis=2)
    # A row that holds NaN has an order too: what is written must be lists whatever the row.
    ordered = tl.where(there & (length == length), length, float("inf"))
    number = tl.where(there, chosen, NOBODY - SLOTS + slot)
    nearer = ordered[:, None, :] < ordered[:, :, None]
    equal = ordered[:, None, :] == ordered[:, :, None]
    before = nearer | (equal & (number[:, None, :] < number[:, :, None]))
    rank = tl.sum(before.to(tl.int32), axis=2)
    product = tl.zeros([BLOCK_ROWS, SLOTS], tl.float32)
    if BLOCK_FEATURES >= D:
        first_residual = tl.sum(tl.where((rank == 0)[:, :, None], r, 0.0), axis=1)
        product += tl.sum(r * first_residual[:, None, :], axis=2)
    else:
        for first in range(0, D, BLOCK_FEATURES):
            d = first + tl.arange(0, BLOCK_FEATURES)
            part = residuals(rows, row, shift, points, safe, d, n_rows, D)
            first_residual = tl.sum(tl.where((rank == 0)[:, :, None], part, 0.0), axis=1)
            product += tl.sum(part * first_residual[:, None, :], axis=2)
    out = row[:, None] * m + rank
    kept = own & (rank < m)
    tl.store(lists + out, safe.to(tl.int64), mask=kept)
    tl.store(distances + out, length, mask=kept)
    tl.store(inner + out, product, mask=kept)
