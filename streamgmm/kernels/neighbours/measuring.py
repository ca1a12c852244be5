# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that measures chosen centroids of one row in fp32, and puts them in order."""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.neighbours.selecting import NOBODY


@triton.jit
def products(
    row, shift, points, who, lead,
    D: tl.constexpr, SPAN: tl.constexpr, PART: tl.constexpr, SLOTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """‖x − c‖² of the centroids ``who`` (SLOTS,) and, if INNER, (x − c)·(x − c'), c' that of ``lead``; fp32.

    A thread adds up PART features apart: few are left to be added across threads, and many loads are under way at once.
    """
    squares = tl.zeros([SLOTS, PART], tl.float32)
    inner = tl.zeros([SLOTS, PART], tl.float32)
    for base in range(0, D, SPAN):
        for part in tl.static_range(SPAN // PART):
            d = base + part * PART + tl.arange(0, PART)
            live = (d < D) | (D % SPAN == 0)
            x = tl.load(row + d, mask=live, other=0).to(tl.float32) - tl.load(shift + d, mask=live, other=0.0)
            c = tl.load(points + who[:, None].to(tl.int64) * D + d[None, :], mask=live[None, :], other=0.0)
            residual = x[None, :] - c
            squares += residual * residual
            if INNER:
                own = x - tl.load(points + lead.to(tl.int64) * D + d, mask=live, other=0.0)
                inner += residual * own[None, :]
    return tl.sum(squares, axis=1), tl.sum(inner, axis=1)


@triton.jit
def measured(
    row, shift, points, chosen, n_lists,
    D: tl.constexpr, SPAN: tl.constexpr, PART: tl.constexpr, SLOTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Of the ``chosen`` (SLOTS,): centroids, ranks, ‖x − c‖² and, if INNER, r·r' with the residual of the first rank.

    Ties go to the lower index. A number that is none counts as the farthest; what is `NOBODY` comes last, and has a
    centroid in any case.
    """
    slot = tl.arange(0, SLOTS)
    there = chosen < n_lists
    who = tl.where(there, chosen, tl.minimum(slot, n_lists - 1))
    lead = tl.sum(tl.where(slot == 0, who, 0), axis=0)
    length, inner = products(row, shift, points, who, lead, D, SPAN, PART, SLOTS, INNER)
    ordered = tl.where(there & (length == length), length, float("inf"))
    number = tl.where(there, chosen, NOBODY - SLOTS + slot)
    nearer = ordered[None, :] < ordered[:, None]
    equal = ordered[None, :] == ordered[:, None]
    before = nearer | (equal & (number[None, :] < number[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    if INNER:
        first = tl.sum(tl.where(rank == 0, who, 0), axis=0)
        # Rounding rarely puts another one first than fp32 does.
        if first != lead:
            again = products(row, shift, points, who, first, D, SPAN, PART, SLOTS, True)
            inner = again[1]
    else:
        inner = length
    return who, rank, length, inner
