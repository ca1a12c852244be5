# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that makes of the groups' winners what is asked for: the nearest centroids, or a row's lists.

A program is one warp, which takes its EACH rows one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.neighbours.measuring import measured
from streamgmm.kernels.neighbours.selecting import select


@triton.jit(do_not_specialize=["n_rows", "n_lists", "groups", "m"])
def refine(
    rows, shift, points, winners, lists, distances, inner, n_rows, n_lists, groups, m,
    D: tl.constexpr, PLACES: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr, SCRAMBLE: tl.constexpr,
    MEMBER_BITS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    SPAN: tl.constexpr, PART: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The SLOTS best winners by their distances in fp32: the first m go to ``lists``, ``distances`` and ``inner``.

    ``points`` (K, D) fp32. A number that is none counts as the farthest; lists are those of centroids in any case.
    """
    start = tl.program_id(0).to(tl.int64) * EACH
    for row in range(start, tl.minimum(start + EACH, n_rows)):
        chosen = select(
            winners + row * (groups * KEEP), groups, PLACES, KEEP, MASK, SCRAMBLE, MEMBER_BITS, ONE_BLOCK, BLOCK, SLOTS
        )
        who, rank, length, product = measured(
            rows + row * D, shift, points, chosen, n_lists, D, SPAN, PART, SLOTS, KEEP > 1
        )
        out = row * m + rank
        kept = rank < m
        tl.store(lists + out, who.to(tl.int64), mask=kept)
        tl.store(distances + out, length, mask=kept)
        tl.store(inner + out, product, mask=kept)


@triton.jit(do_not_specialize=["strength", "gate", "n_rows", "n_lists", "groups", "m"])
def choose(
    rows, shift, points, winners, lists, gains, strength, gate, n_rows, n_lists, groups, m,
    LOSS: tl.constexpr, COLUMNS: tl.constexpr, NO_LIST: tl.constexpr,
    D: tl.constexpr, PLACES: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr, SCRAMBLE: tl.constexpr,
    MEMBER_BITS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    SPAN: tl.constexpr, PART: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """``lists`` (N, COLUMNS) int32 and ``gains`` (N,) fp32 of `Search.lists`."""
    start = tl.program_id(0).to(tl.int64) * EACH
    for row in range(start, tl.minimum(start + EACH, n_rows)):
        chosen = select(
            winners + row * (groups * KEEP), groups, PLACES, KEEP, MASK, SCRAMBLE, MEMBER_BITS, ONE_BLOCK, BLOCK, SLOTS
        )
        who, rank, length, product = measured(
            rows + row * D, shift, points, chosen, n_lists, D, SPAN, PART, SLOTS, COLUMNS == 2 and LOSS != "top2"
        )
        # Nothing, unless a distance is no number or infinite: then that is what the gain is.
        gain = tl.sum(tl.where(rank < m, length * 0.0, 0.0), axis=0)
        tl.store(lists + row * COLUMNS, tl.sum(tl.where(rank == 0, who, 0), axis=0))
        if COLUMNS == 2:
            nearest = tl.sum(tl.where(rank == 0, length, 0.0), axis=0)
            loss = length
            if LOSS == "soar":
                loss += strength * product * product / tl.maximum(nearest, 1.1754943508222875e-38)
            if LOSS == "air":
                loss += strength * product
            loss = tl.where((rank > 0) & (rank < m), loss, float("inf"))
            least = tl.min(loss, axis=0)
            place = tl.min(tl.where((loss == least) & (rank > 0), rank, SLOTS), axis=0)
            second = tl.sum(tl.where(rank == place, who, 0), axis=0)
            gain += tl.where(nearest > 0, tl.div_rn(least, nearest) - 1.0, float("inf"))
            kept = (gain < gate) | (gate == float("inf"))
            tl.store(lists + row * COLUMNS + 1, tl.where(kept, second, NO_LIST))
        tl.store(gains + row, gain)
