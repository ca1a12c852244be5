# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code of the second launch: statistics of each granule, and their sum in the order of the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.fused.joint import dot_components_first, square_planes
from streamgmm.kernels.fused.running import RESP_SCALE


@triton.jit(do_not_specialize=["n_rows", "pitch", "threshold"])
def list_live_rows(
    maxima, lse, labels, lists, n_live, n_rows, pitch, threshold,
    GRANULE: tl.constexpr, DENSE_ABOVE: tl.constexpr, HARD: tl.constexpr, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of a granule that matter to a tile of components, in order, and how many there are.

    Grid (tiles, granules). A row matters where its largest l in the tile, ``maxima`` (tiles, pitch), less its lse
    exceeds ``threshold`` bits; with HARD, where its label lies in the tile. Beyond DENSE_ABOVE of the granule all rows
    are listed. ``lists`` (tiles, pitch) int32 gets numbers within the granule, and may be the memory of ``maxima``:
    a row's place never lies behind the row. ``n_live`` is (granules, tiles).
    """
    tile = tl.program_id(0).to(tl.int64)
    granule = tl.program_id(1)
    start = granule.to(tl.int64) * GRANULE
    maxima += tile * pitch + start
    lists += tile * pitch + start
    rows = tl.minimum(GRANULE, n_rows - granule * GRANULE)
    found = 0
    for first in range(0, rows, BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        if HARD:
            # Division rounds to zero: -1 would lie in the first tile.
            live = tl.load(labels + start + i, mask=i < rows, other=-TILE) // TILE == tile
        else:
            largest = tl.load(maxima + i, mask=i < rows, other=float("-inf"))
            live = largest - tl.load(lse + start + i, mask=i < rows, other=0.0) > threshold
        live = live.to(tl.int32)
        place = found + tl.cumsum(live, axis=0) - live
        tl.store(lists + place, i, mask=live > 0)
        found += tl.sum(live, axis=0)
    if found > DENSE_ABOVE * rows:
        for first in range(0, rows, BLOCK_ROWS):
            i = first + tl.arange(0, BLOCK_ROWS)
            tl.store(lists + i, i, mask=i < rows)
        found = rows
    tl.store(n_live + granule * tl.num_programs(0) + tile, found)


@triton.jit
def rounded_resp(resp):
    """Responsibilities in fp16, and what they are then: counts and products describe the same ones."""
    rounded = (resp * RESP_SCALE).to(tl.float16)
    return rounded, rounded.to(tl.float32)


@triton.jit(do_not_specialize=["pitch", "first_tile", "n_tiles", "n_slices"])
def accumulate(
    x, norms, lse, labels, weights, units, lists, n_live, linear, quadratic, exponents, constants,
    counts, sums, scatter, pitch, first_tile, n_tiles, n_slices,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, GRANULE: tl.constexpr,
    DIAG: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, HARD: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One granule's Σ r, Σ r x', Σ r x'² (or Σ r ‖x'‖²): a program owns a tile of components and a slice of features.

    Grid (tiles · slices, granules); the tiles begin at ``first_tile`` of ``n_tiles``. Only listed rows are visited.
    With HARD r follows from ``labels``; otherwise it is computed here, and the slice must hold all features.
    ``counts`` (granules, K'), ``sums`` (granules, K', STRIDE), ``scatter`` as ``sums`` for diag and as ``counts`` with
    NORM, fp32, where K' components are covered by the grid. With WEIGHTED each row counts ``weights`` (padded N,) fp32
    times, in ``units`` (granules,).
    """
    part = tl.program_id(0) % n_slices
    own_tile = tl.program_id(0) // n_slices
    granule = tl.program_id(1)
    covered = (tl.num_programs(0) // n_slices) * TILE

    own = own_tile * TILE + tl.arange(0, TILE)
    k = first_tile * TILE + own
    lane = tl.arange(0, BLOCK_ROWS)
    features = part * SLICE + tl.arange(0, SLICE)
    if not HARD:
        theta = k[:, None].to(tl.int64) * STRIDE + features[None, :]
        own_linear = tl.load(linear + theta)
        own_quadratic = tl.load(quadratic + theta) if DIAG else 0
        constant = tl.load(constants + k)[:, None]
        q = tl.load(quadratic + k)[:, None] if NORM else 0.0

    count = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE, SLICE], tl.float32)
    squared = tl.zeros([TILE, SLICE], tl.float32) if DIAG else tl.zeros([TILE], tl.float32)

    start = granule.to(tl.int64) * GRANULE
    x += start * STRIDE
    lse += start
    norms += start
    labels += start
    weights += start
    lists += (first_tile + own_tile).to(tl.int64) * pitch + start
    listed = tl.load(n_live + granule * n_tiles + first_tile + own_tile)
    for first in range(0, listed, BLOCK_ROWS):
        i = first + lane
        row = tl.load(lists + i, mask=i < listed, other=0)
        norm = tl.load(norms + row)[None, :] if NORM else tl.zeros([1, BLOCK_ROWS], tl.float32)
        own_x = tl.load(x + row[:, None].to(tl.int64) * STRIDE + features[None, :])
        high, low = square_planes(own_x) if DIAG else (0, 0)
        if HARD:
            label = tl.load(labels + row, mask=i < listed, other=-1)
            r = tl.where(label[None, :] == k[:, None], 1.0, 0.0)
        else:
            # The logit has the bits of the first launch: all sums are in that one's order, and lse comes last.
            acc = constant + norm * q
            acc = dot_components_first(acc, own_x, high, low, own_linear, own_quadratic, DIAG)
            if SCALED:
                acc *= tl.load(exponents + k)[:, None]
            r = tl.exp2(acc - tl.load(lse + row, mask=i < listed, other=float("inf"))[None, :])
        if WEIGHTED:
            r *= tl.load(weights + row)[None, :]
        rounded, r = rounded_resp(r)
        count += tl.sum(r, axis=1)
        weighted = tl.dot(rounded, own_x, weighted)
        if DIAG:
            squared = tl.dot(rounded, high, squared)
            squared = tl.dot(rounded, low, squared)
        elif NORM:
            squared += tl.sum(r * norm, axis=1)

    unit = 1.0 / RESP_SCALE
    if WEIGHTED:
        unit *= tl.load(units + granule)
    place = granule.to(tl.int64) * covered + own
    tl.store(sums + place[:, None] * STRIDE + features[None, :], weighted * unit)
    if DIAG:
        tl.store(scatter + place[:, None] * STRIDE + features[None, :], squared * unit)
    # All slices hold the same counts; the first one's are kept.
    if part == 0:
        tl.store(counts + place, count * unit)
        if NORM:
            tl.store(scatter + place, squared * unit)


@triton.jit(do_not_specialize=["n_rows"])
def second_moment(
    x, weights, units, moments, n_rows,
    STRIDE: tl.constexpr, GRANULE: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """One granule's Σ w x xᵀ, ``moments`` (granules, STRIDE, STRIDE) fp32: the scatter of ``tied``.

    Grid (feature blocks, feature blocks, granules); a block below the diagonal is stored with the one above it.
    """
    across = tl.program_id(0)
    down = tl.program_id(1)
    granule = tl.program_id(2)
    if across < down:
        return
    i = down * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    j = across * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    lane = tl.arange(0, BLOCK_ROWS)
    start = granule.to(tl.int64) * GRANULE
    x += start * STRIDE
    weights += start
    acc = tl.zeros([BLOCK_FEATURES, BLOCK_FEATURES], tl.float32)
    # Rows past n_rows are zero.
    for first in range(0, tl.minimum(GRANULE, n_rows - granule * GRANULE), BLOCK_ROWS):
        row = first + lane
        left = tl.load(x + row[:, None] * STRIDE + i[None, :])
        right = tl.load(x + row[:, None] * STRIDE + j[None, :])
        if WEIGHTED:
            right = (right.to(tl.float32) * tl.load(weights + row)[:, None]).to(right.dtype)
        # Tensor cores truncate: a sum of squares that stayed in them would lose 2⁻²⁴ of itself every sixteen rows. The
        # half keeps the compiler from folding this addition into the product again.
        acc += 0.5 * tl.dot(tl.trans(left), right)
    acc *= 2.0
    if WEIGHTED:
        acc *= tl.load(units + granule)
    moments += granule.to(tl.int64) * STRIDE * STRIDE
    tl.store(moments + i[:, None] * STRIDE + j[None, :], acc)
    tl.store(moments + j[None, :] * STRIDE + i[:, None], acc)


@triton.jit(do_not_specialize=["n_rows"])
def sum_rows(
    lse, norms, weights, out, n_rows,
    COMMON: tl.constexpr, GRANULE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out (granules, 2) fp64: Σ w log p in nats and Σ w of one granule's rows, in an order that N does not change.

    log₂ p is lse, with COMMON less ½ log₂e ‖x'‖². ``weights`` (N,) fp64.
    """
    granule = tl.program_id(0).to(tl.int64)
    likelihood = tl.zeros([BLOCK_ROWS], tl.float64)
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for first in range(0, GRANULE, BLOCK_ROWS):
        row = granule * GRANULE + first + tl.arange(0, BLOCK_ROWS)
        live = row < n_rows
        value = tl.load(lse + row, mask=live, other=0.0).to(tl.float64)
        if COMMON:
            value -= 0.7213475204444817 * tl.load(norms + row, mask=live, other=0.0).to(tl.float64)
        weight = tl.load(weights + row, mask=live, other=0.0) if WEIGHTED else live.to(tl.float64)
        likelihood += weight * value
        total += weight
    tl.store(out + 2 * granule, tl.sum(likelihood, axis=0) * 0.6931471805599453)
    tl.store(out + 2 * granule + 1, tl.sum(total, axis=0))


@triton.jit
def any_flag(flags, n_flags):
    """Whether one of ``flags`` (n_flags,) int32 is not zero."""
    lane = tl.arange(0, 128)
    found = tl.zeros([128], tl.int32)
    for first in range(0, n_flags, 128):
        found |= tl.load(flags + first + lane, mask=first + lane < n_flags, other=0)
    return tl.max(tl.abs(found), axis=0) > 0


@triton.jit(do_not_specialize=["n_flags"])
def add_rows(total_likelihood, total_rows, sums, ends, flags, n_flags):
    """fp64 totals (runs,) += the two sums of `sum_rows`, one granule after the other; nothing where a flag is set.

    Grid (runs,). ``ends`` (runs + 1,) int32: a run's granules are from its own to before the next one's.
    """
    if any_flag(flags, n_flags):
        return
    run = tl.program_id(0)
    likelihood = tl.load(total_likelihood + run)
    rows = tl.load(total_rows + run)
    for granule in range(tl.load(ends + run), tl.load(ends + run + 1)):
        likelihood += tl.load(sums + 2 * granule)
        rows += tl.load(sums + 2 * granule + 1)
    tl.store(total_likelihood + run, likelihood)
    tl.store(total_rows + run, rows)


@triton.jit(do_not_specialize=["n_components", "pitch", "n_flags"])
def add_partials(
    total_counts, total_sums, total_scatter, order, counts, sums, scatter, n_components, ends, pitch, flags, n_flags,
    D: tl.constexpr, STRIDE: tl.constexpr, DIAG: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp64 totals (runs, ·) += the partials of `accumulate`, one granule after the other: the order of the rows.

    Grid (components, feature blocks, runs). Component i of the partials is component ``order[i]`` of ``n_components``;
    ``pitch`` components lie between granules; ``ends`` as in `add_rows`. Nothing is added where a flag is set.
    """
    if any_flag(flags, n_flags):
        return
    own = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    run = tl.program_id(2)
    live = d < D
    begin = tl.load(ends + run)
    end = tl.load(ends + run + 1)
    component = run.to(tl.int64) * n_components + tl.load(order + own)
    acc = tl.load(total_sums + component * D + d, mask=live, other=0.0)
    square = tl.load(total_scatter + component * D + d, mask=live, other=0.0) if DIAG else 0.0
    for granule in range(begin, end):
        place = (granule * pitch + own) * STRIDE + d
        acc += tl.load(sums + place, mask=live, other=0.0).to(tl.float64)
        if DIAG:
            square += tl.load(scatter + place, mask=live, other=0.0).to(tl.float64)
    tl.store(total_sums + component * D + d, acc, mask=live)
    if DIAG:
        tl.store(total_scatter + component * D + d, square, mask=live)
    if tl.program_id(1) == 0:
        count = tl.load(total_counts + component)
        norm = tl.load(total_scatter + component) if NORM else 0.0
        for granule in range(begin, end):
            place = granule * pitch + own
            count += tl.load(counts + place).to(tl.float64)
            if NORM:
                norm += tl.load(scatter + place).to(tl.float64)
        tl.store(total_counts + component, count)
        if NORM:
            tl.store(total_scatter + component, norm)


@triton.jit(do_not_specialize=["size", "n_flags"])
def add_in_order(total, partials, size, width, padded_width, ends, pitch, flags, n_flags, BLOCK: tl.constexpr):
    """total (runs, ·, width) fp64 += partials (granules, ·, padded_width), one granule after the other.

    Grid (blocks, runs). ``size`` elements of a run are added, and ``pitch`` lie between granules; ``ends`` as in
    `add_rows`. Nothing is added where a flag is set.
    """
    if any_flag(flags, n_flags):
        return
    run = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    begin = tl.load(ends + run)
    end = tl.load(ends + run + 1)
    total += run.to(tl.int64) * size
    partials += (i // width).to(tl.int64) * padded_width + i % width + begin.to(tl.int64) * pitch
    acc = tl.load(total + i, mask=live, other=0.0)
    for _ in range(begin, end):
        acc += tl.load(partials, mask=live, other=0.0).to(tl.float64)
        partials += pitch
    tl.store(total + i, acc, mask=live)
