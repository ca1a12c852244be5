# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that finds the best members of each group of centroids for each row."""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(float("-inf"))
LEVELS = tl.constexpr(6)
"""Halvings of a group's members in a tile at most, the first one not counted."""


@triton.jit
def larger_two(score, BLOCK_ROWS: tl.constexpr, MEMBERS: tl.constexpr, PLACES: tl.constexpr):
    """The largest and the second of the MEMBERS scores of each group, (rows, PLACES) each.

    ``score`` (rows, MEMBERS · PLACES), members first; a power of two, at least 2. Columns of one group are PLACES
    apart: a thread has them all, and exchanges nothing.
    """
    halves = tl.reshape(score, [BLOCK_ROWS, 2, MEMBERS // 2, PLACES])
    best, second = tl.max(halves, axis=1), tl.min(halves, axis=1)
    for level in tl.static_range(LEVELS):
        if MEMBERS >> (level + 2) > 0:
            bests = tl.reshape(best, [BLOCK_ROWS, 2, MEMBERS >> (level + 2), PLACES])
            seconds = tl.reshape(second, [BLOCK_ROWS, 2, MEMBERS >> (level + 2), PLACES])
            best = tl.max(bests, axis=1)
            second = tl.maximum(tl.min(bests, axis=1), tl.max(seconds, axis=1))
    return tl.reshape(best, [BLOCK_ROWS, PLACES]), tl.reshape(second, [BLOCK_ROWS, PLACES])


@triton.jit
def packed_scores(
    x_rows, resident, half, unit, points, half_norms, k, member,
    STRIDE: tl.constexpr, STEP: tl.constexpr, MEMBER_BITS: tl.constexpr,
):  # fmt: skip
    """u·(−½‖x/u − c‖²) of one tile, (rows, columns k) fp32 below zero, each with its member's number in its low bits.

    Of equal scores below zero the one with the lower number is the larger.
    """
    d = tl.arange(0, STEP)
    place = k[None, :].to(tl.int64) * STRIDE
    # The sum begins with what it ends near: tensor cores truncate.
    acc = -(half + unit * tl.load(half_norms + k)[None, :])
    if STEP == STRIDE:
        acc = tl.dot(resident, tl.load(points + place + d[:, None]), acc)
    else:
        for first in range(0, STRIDE, STEP):
            part = tl.load(x_rows + (first + d)[None, :])
            acc = tl.dot(part, tl.load(points + place + (first + d)[:, None]), acc)
    cut = acc.to(tl.int32, bitcast=True) & (-(1 << MEMBER_BITS))
    return (cut | member[None, :]).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n_tiles", "pitch"])
def group_winners(
    x, halves, units, points, half_norms, winners, n_tiles, pitch,
    STRIDE: tl.constexpr, STEP: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr, KEEP: tl.constexpr,
    MEMBER_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``winners`` (padded N, pitch) fp32: the KEEP largest `packed_scores` of each group of each row.

    ``points`` (columns, STRIDE) fp16 and ``half_norms`` (columns,) fp32 in the order of `Grouping.centroids`. A run's
    winners lie together, the largest of its PLACES groups first, then the second of each.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x_rows = x + row[:, None] * STRIDE
    resident = tl.load(x_rows + tl.arange(0, STEP)[None, :]) if STEP == STRIDE else 0
    half = tl.load(halves + row)[:, None]
    unit = tl.load(units + row)[:, None]
    place = winners + row[:, None] * pitch + tl.arange(0, PLACES)[None, :]
    column = tl.arange(0, TILE)
    best = tl.full([BLOCK_ROWS, PLACES], FLOOR, tl.float32)
    second = tl.full([BLOCK_ROWS, PLACES], FLOOR, tl.float32)
    for tile in range(n_tiles):
        member = (tile % RUN) * (TILE // PLACES) + column // PLACES
        score = packed_scores(
            x_rows, resident, half, unit, points, half_norms, tile * TILE + column, member, STRIDE, STEP, MEMBER_BITS
        )
        if KEEP == 1:
            cube = tl.reshape(score, [BLOCK_ROWS, TILE // PLACES, PLACES])
            best = tl.maximum(best, tl.max(cube, axis=1))
        else:
            one, two = larger_two(score, BLOCK_ROWS, TILE // PLACES, PLACES)
            second = tl.maximum(tl.minimum(best, one), tl.maximum(second, two))
            best = tl.maximum(best, one)
        if tile % RUN == RUN - 1:
            own = place + (tile // RUN) * (KEEP * PLACES)
            tl.store(own, best)
            best = tl.full([BLOCK_ROWS, PLACES], FLOOR, tl.float32)
            if KEEP == 2:
                tl.store(own + PLACES, second)
                second = tl.full([BLOCK_ROWS, PLACES], FLOOR, tl.float32)
