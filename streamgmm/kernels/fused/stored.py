# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code of the second launch for rows too wide for one program: responsibilities first, then what they weigh.

`sums.accumulate` evaluates a tile's logits where it adds; where several programs share a row's features, each would do
so again. Here `respond` stores r, `count_stored` adds it up, and `accumulate_stored` is a product of matrices and
nothing else, so that many programs are at work at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.fused.joint import logits, square_planes
from streamgmm.kernels.fused.running import RESP_SCALE
from streamgmm.kernels.fused.sums import rounded_resp


@triton.jit(do_not_specialize=["pitch", "first_tile", "n_tiles", "n_blocks"])
def respond(
    x, norms, lse, weights, lists, n_live, linear, quadratic, exponents, constants, resp,
    pitch, first_tile, n_tiles, n_blocks,
    STRIDE: tl.constexpr, STEP: tl.constexpr, GRANULE: tl.constexpr,
    DIAG: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """r of the listed rows and a tile's components, fp16 times 2¹⁵: ``resp`` (tiles of the grid, pitch, TILE).

    Grid (tiles, granules · n_blocks); a program has BLOCK_ROWS of a list, which covers a granule in ``n_blocks``.
    """
    own_tile = tl.program_id(0)
    granule = tl.program_id(1) // n_blocks
    first = (tl.program_id(1) % n_blocks) * BLOCK_ROWS
    listed = tl.load(n_live + granule * n_tiles + first_tile + own_tile)
    if first >= listed:
        return
    start = granule.to(tl.int64) * GRANULE
    i = first + tl.arange(0, BLOCK_ROWS)
    lists += (first_tile + own_tile).to(tl.int64) * pitch + start
    row = start + tl.load(lists + i, mask=i < listed, other=0)
    k = (first_tile + own_tile) * TILE + tl.arange(0, TILE)
    norm = tl.load(norms + row)[:, None] if NORM else tl.zeros([BLOCK_ROWS, 1], tl.float32)
    # The tile goes by the first launch's code, so that its logits have that one's bits.
    logit = logits(
        x + row[:, None] * STRIDE, 0, 0, 0, norm, linear, quadratic, exponents, constants, k,
        STRIDE, STEP, DIAG, NORM, SCALED,
    )  # fmt: skip
    r = tl.exp2(logit - tl.load(lse + row, mask=i < listed, other=float("inf"))[:, None])
    if WEIGHTED:
        r *= tl.load(weights + row)[:, None]
    rounded, _ = rounded_resp(r)
    place = own_tile.to(tl.int64) * pitch + start + i
    tl.store(resp + place[:, None] * TILE + tl.arange(0, TILE)[None, :], rounded)


@triton.jit(do_not_specialize=["pitch", "first_tile", "n_tiles"])
def count_stored(
    norms, units, lists, n_live, resp, counts, scatter, pitch, first_tile, n_tiles,
    GRANULE: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One granule's Σ r, and with NORM Σ r ‖x'‖²: ``counts`` and ``scatter`` (granules, K') fp32, K' of the grid.

    Grid (tiles, granules). ``resp`` is `respond`'s; its weights are in ``units`` (granules,) with WEIGHTED.
    """
    own_tile = tl.program_id(0)
    granule = tl.program_id(1)
    lane = tl.arange(0, BLOCK_ROWS)
    own = tl.arange(0, TILE)
    start = granule.to(tl.int64) * GRANULE
    norms += start
    lists += (first_tile + own_tile).to(tl.int64) * pitch + start
    resp += (own_tile.to(tl.int64) * pitch + start) * TILE
    listed = tl.load(n_live + granule * n_tiles + first_tile + own_tile)
    # Rows are summed last: each lane's sum is short, and threads exchange nothing on the way.
    count = tl.zeros([BLOCK_ROWS, TILE], tl.float32)
    squared = tl.zeros([BLOCK_ROWS, TILE], tl.float32)
    for first in range(0, listed, BLOCK_ROWS):
        i = first + lane
        r = tl.load(resp + i[:, None] * TILE + own[None, :], mask=(i < listed)[:, None], other=0.0).to(tl.float32)
        count += r
        if NORM:
            norm = tl.load(norms + tl.load(lists + i, mask=i < listed, other=0))
            squared += r * norm[:, None]
    unit = 1.0 / RESP_SCALE
    if WEIGHTED:
        unit *= tl.load(units + granule)
    place = (granule.to(tl.int64) * tl.num_programs(0) + own_tile) * TILE + own
    tl.store(counts + place, tl.sum(count, axis=0) * unit)
    if NORM:
        tl.store(scatter + place, tl.sum(squared, axis=0) * unit)


@triton.jit(do_not_specialize=["pitch", "first_tile", "n_tiles", "n_slices"])
def accumulate_stored(
    x, units, lists, n_live, resp, sums, scatter, pitch, first_tile, n_tiles, n_slices,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, GRANULE: tl.constexpr, DIAG: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One granule's Σ r x' and, with DIAG, Σ r x'²: a program owns a tile of components and a slice of features.

    Grid (tiles · slices, granules). ``sums`` and, with DIAG, ``scatter`` (granules, K', STRIDE) fp32, K' of the grid;
    the other arguments as in `count_stored`.
    """
    part = tl.program_id(0) % n_slices
    own_tile = tl.program_id(0) // n_slices
    granule = tl.program_id(1)
    covered = (tl.num_programs(0) // n_slices) * TILE
    own = tl.arange(0, TILE)
    lane = tl.arange(0, BLOCK_ROWS)
    features = part * SLICE + tl.arange(0, SLICE)
    start = granule.to(tl.int64) * GRANULE
    x += start * STRIDE
    lists += (first_tile + own_tile).to(tl.int64) * pitch + start
    resp += (own_tile.to(tl.int64) * pitch + start) * TILE
    listed = tl.load(n_live + granule * n_tiles + first_tile + own_tile)
    weighted = tl.zeros([TILE, SLICE], tl.float32)
    squared = tl.zeros([TILE, SLICE], tl.float32)
    for first in range(0, listed, BLOCK_ROWS):
        i = first + lane
        row = tl.load(lists + i, mask=i < listed, other=0)
        own_x = tl.load(x + row[:, None].to(tl.int64) * STRIDE + features[None, :])
        stored = tl.load(resp + i[:, None] * TILE + own[None, :], mask=(i < listed)[:, None], other=0.0)
        r = tl.trans(stored)
        weighted = tl.dot(r, own_x, weighted)
        if DIAG:
            high, low = square_planes(own_x)
            squared = tl.dot(r, high, squared)
            squared = tl.dot(r, low, squared)
    unit = 1.0 / RESP_SCALE
    if WEIGHTED:
        unit *= tl.load(units + granule)
    place = granule.to(tl.int64) * covered + own_tile * TILE + own
    block = place[:, None] * STRIDE + features[None, :]
    tl.store(sums + block, weighted * unit)
    if DIAG:
        tl.store(scatter + block, squared * unit)
