# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code of ``high``, the second launch: statistics of each granule about the components' own centres."""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.fused.running import RESP_SCALE
from streamgmm.kernels.fused.split import (
    form_rows_first,
    load_pair,
    load_planes,
    load_resident,
    split_components_first,
    split_form,
)


@triton.jit
def split_resp(resp):
    """r as hi + lo in fp16, times RESP_SCALE: 22 bits."""
    scaled = resp * RESP_SCALE
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def add_weighted(whole, rest, high, low, x1, x2, x3):
    """whole += Σ r X₁ and rest += 2¹⁵ Σ r (X₂ + X₃), (components, S) fp32: r of `split_resp`, X (rows, S).

    The tensor core truncates as it adds, so the large total stays out of it; the factor keeps the compiler from folding
    it back into the product. A row that one component takes adds integers, and ``whole`` stays exact.
    """
    rest = tl.dot(low, x1, rest)
    rest = tl.dot(high, x3, rest)
    rest = tl.dot(high, x2, rest)
    large = tl.dot(high, x1)
    return tl.fma(large, tl.full(large.shape, 1.0 / RESP_SCALE, tl.float32), whole), rest


@triton.jit
def form_components_first(
    x, own, resident, norms, linear, quadratic, theta, held, energies, x_plane, k_plane, n_padded, n_components,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`form_rows_first` with (components, rows), to the same bits: every sum is in that one's order.

    ``held`` are the planes of θ where one step takes all features; ``norms`` is (1, rows), ``energies`` (k, 1).
    """
    slices: tl.constexpr = STRIDE // SLICE
    form = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
    for part in range(slices):
        exact = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
        rest = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
        if STEP == STRIDE:
            exact, rest = split_components_first(exact, rest, resident[0], resident[1], resident[2], held[0], held[1])
            if DIAG:
                exact, rest = split_components_first(
                    exact, rest, resident[3], resident[4], resident[5], held[2], held[3]
                )
        else:
            for first in range(part * SLICE, (part + 1) * SLICE, STEP):
                a1, a2, a3 = load_planes(x + first, own, x_plane)
                b1, b2 = load_pair(linear + first, theta, k_plane)
                exact, rest = split_components_first(exact, rest, a1, a2, a3, b1, b2)
                if DIAG:
                    c1, c2, c3 = load_planes(x + 3 * x_plane + first, own, x_plane)
                    e1, e2 = load_pair(quadratic + first, theta, k_plane)
                    exact, rest = split_components_first(exact, rest, c1, c2, c3, e1, e2)
        whole_k, rest_k = load_pair(energies, part * n_components, slices * n_components)
        whole_n, rest_n = 0.0, 0.0
        if not DIAG:
            whole_n, rest_n = load_pair(norms, part * n_padded.to(tl.int64), slices * n_padded.to(tl.int64))
        form += split_form(exact, rest, whole_n, rest_n, whole_k, rest_k, DIAG)
    return form


@triton.jit(do_not_specialize=["n_padded", "n_components", "first_tile", "n_tiles", "n_blocks"])
def split_forms(
    x, norms, lists, n_live, linear, quadratic, energies, forms,
    n_padded, n_components, first_tile, n_tiles, n_blocks,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, GRANULE: tl.constexpr, DIAG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """t of the listed rows and a tile's components: ``forms`` (tiles of the grid, padded N, TILE) fp32.

    Grid (tiles, granules · n_blocks); a program has BLOCK_ROWS of a list, which covers a granule in ``n_blocks``. Where
    several programs share a row's features, each takes responsibilities from here.
    """
    own_tile = tl.program_id(0)
    granule = tl.program_id(1) // n_blocks
    first = (tl.program_id(1) % n_blocks) * BLOCK_ROWS
    tile = first_tile + own_tile
    listed = tl.load(n_live + granule * n_tiles + tile)
    if first >= listed:
        return
    start = granule.to(tl.int64) * GRANULE
    i = first + tl.arange(0, BLOCK_ROWS)
    row = tl.load(lists + tile.to(tl.int64) * n_padded + start + i, mask=i < listed, other=0)
    d = tl.arange(0, STEP)
    k = tile * TILE + tl.arange(0, TILE)
    own = row[:, None] * STRIDE + d[None, :]
    theta = tl.arange(0, TILE)[None, :] * STRIDE + d[:, None]
    first_theta = tile.to(tl.int64) * TILE * STRIDE
    x += start * STRIDE
    x_plane = n_padded.to(tl.int64) * STRIDE
    form = form_rows_first(
        x, own, load_resident(x, own, x_plane, STEP == STRIDE, DIAG), norms + start + row[:, None],
        linear + first_theta, quadratic + (first_theta if DIAG else 0), theta, energies + k[None, :],
        x_plane, n_components.to(tl.int64) * STRIDE, n_padded, n_components,
        STRIDE, SLICE, STEP, DIAG, BLOCK_ROWS, TILE,
    )  # fmt: skip
    place = own_tile.to(tl.int64) * n_padded + start + i
    tl.store(forms + place[:, None] * TILE + tl.arange(0, TILE)[None, :], form, mask=(i < listed)[:, None])


@triton.jit(do_not_specialize=["n_padded", "n_components", "first_tile", "n_tiles", "n_parts", "covered"])
def split_accumulate(
    x, norms, lse, labels, weights, weight_units, lists, n_live, linear, quadratic, energies, factors, constants,
    centres, forms, counts, sums, scatter, n_padded, n_components, first_tile, n_tiles, n_parts, covered,
    row_unit, square_unit, product_unit,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, OWN: tl.constexpr, GRANULE: tl.constexpr,
    DIAG: tl.constexpr, GIVEN: tl.constexpr, HARD: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One granule's Σ r, Σ r (x'−c_k) and Σ r (x'−c_k)² (diag) or Σ r ‖x'−μ'_k‖² (spherical).

    c_k is near μ'_k and a whole number in rows' units: about it the sums are small, and fp32 resolves them;
    `split_parameters.Centres` brings them to the origin. Grid (tiles · parts, granules): a program owns a tile of
    components, the first of them ``first_tile`` of ``n_tiles``, and OWN features, and visits the listed rows only. t is
    of `split_forms` where GIVEN. ``counts`` (granules, covered), ``sums`` (granules, covered, STRIDE), ``scatter`` as
    ``sums`` for diag or as ``counts`` for spherical, fp32. With WEIGHTED each row counts ``weights`` (padded N,) fp32
    times, in ``weight_units`` (granules,); with HARD it belongs to the component in the place ``labels`` says.
    """
    part = tl.program_id(0) % n_parts
    own_tile = tl.program_id(0) // n_parts
    granule = tl.program_id(1)
    tile = first_tile + own_tile

    own_k = own_tile * TILE + tl.arange(0, TILE)
    k = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, STEP)
    own_features = part * OWN + tl.arange(0, OWN)
    lane = tl.arange(0, BLOCK_ROWS)
    x_plane = n_padded.to(tl.int64) * STRIDE
    k_plane = n_components.to(tl.int64) * STRIDE
    theta = tl.arange(0, TILE)[:, None] * STRIDE + d[None, :]
    linear += tile.to(tl.int64) * TILE * STRIDE
    if DIAG:
        quadratic += tile.to(tl.int64) * TILE * STRIDE
    factor = tl.load(factors + k)[:, None]
    constant = tl.load(constants + k)[:, None]
    held = (0, 0, 0, 0)
    if STEP == STRIDE and not GIVEN:
        m1, m2 = load_pair(linear, theta, k_plane)
        if DIAG:
            q1, q2 = load_pair(quadratic, theta, k_plane)
            held = (m1, m2, q1, q2)
        else:
            held = (m1, m2, 0, 0)

    count = tl.zeros([TILE], tl.float32)
    whole = tl.zeros([TILE, OWN], tl.float32)
    rest_sum = tl.zeros([TILE, OWN], tl.float32)
    if DIAG:
        whole_square = tl.zeros([TILE, OWN], tl.float32)
        rest_square = tl.zeros([TILE, OWN], tl.float32)
    distance = tl.zeros([TILE], tl.float32)

    start = granule.to(tl.int64) * GRANULE
    x += start * STRIDE
    norms += start
    lse += start
    labels += start
    weights += start
    lists += tile.to(tl.int64) * n_padded + start
    forms += (own_tile.to(tl.int64) * n_padded + start) * TILE
    listed = tl.load(n_live + granule * n_tiles + tile)
    for first_row in range(0, listed, BLOCK_ROWS):
        i = first_row + lane
        row = tl.load(lists + i, mask=i < listed, other=0)
        resident = load_resident(x, row[:, None] * STRIDE + d[None, :], x_plane, STEP == STRIDE and not GIVEN, DIAG)
        if GIVEN:
            given = forms + i[:, None] * TILE + tl.arange(0, TILE)[None, :]
            form = tl.trans(tl.load(given, mask=(i < listed)[:, None], other=0.0))
        else:
            form = form_components_first(
                x, row[:, None] * STRIDE + d[None, :], resident, norms + row[None, :], linear, quadratic, theta, held,
                energies + k[:, None], x_plane, k_plane, n_padded, n_components,
                STRIDE, SLICE, STEP, DIAG, BLOCK_ROWS, TILE,
            )  # fmt: skip
        if HARD:
            label = tl.load(labels + row, mask=i < listed, other=-1)
            resp = tl.where(label[None, :] == k[:, None], 1.0, 0.0)
        else:
            # The logit has the bits of the first launch, and lse comes last.
            own_lse = tl.load(lse + row, mask=i < listed, other=float("inf"))
            resp = tl.exp2(tl.fma(form, factor, constant) - own_lse[None, :])
        if WEIGHTED:
            resp *= tl.load(weights + row)[None, :]
        high, low = split_resp(resp)
        # Everything below uses the rounded value: counts and products then describe the same responsibilities.
        rounded = (high.to(tl.float32) + low.to(tl.float32)) * (1.0 / RESP_SCALE)
        count += tl.sum(rounded, axis=1)
        if not DIAG:
            distance += tl.sum(rounded * form, axis=1)
        if STEP == STRIDE and not GIVEN:
            whole, rest_sum = add_weighted(whole, rest_sum, high, low, resident[0], resident[1], resident[2])
            if DIAG:
                whole_square, rest_square = add_weighted(
                    whole_square, rest_square, high, low, resident[3], resident[4], resident[5]
                )
        else:
            own_x = row[:, None] * STRIDE + own_features[None, :]
            y1, y2, y3 = load_planes(x, own_x, x_plane)
            whole, rest_sum = add_weighted(whole, rest_sum, high, low, y1, y2, y3)
            if DIAG:
                z1, z2, z3 = load_planes(x + 3 * x_plane, own_x, x_plane)
                whole_square, rest_square = add_weighted(whole_square, rest_square, high, low, z1, z2, z3)

    unit = tl.load(weight_units + granule) if WEIGHTED else 1.0
    place = granule.to(tl.int64) * covered + own_k
    block = place[:, None] * STRIDE + own_features[None, :]
    row_length = 1.0 / row_unit
    # Whole numbers cancel exactly in one fused multiply-add; the fractions are small already.
    centre = tl.load(centres + k[:, None].to(tl.int64) * STRIDE + own_features[None, :]).to(tl.float32)
    mass = tl.broadcast_to(count[:, None], whole.shape)
    rest_sum = rest_sum * (1.0 / RESP_SCALE)
    tl.store(sums + block, (tl.fma(-centre, mass, whole) + rest_sum) * (row_length * unit))
    if DIAG:
        # c in the unit of x'² over that of x'.
        ratio = centre * (square_unit * row_length * row_length)
        rest_square = rest_square * (1.0 / RESP_SCALE)
        square = tl.fma(-ratio, tl.fma(-centre, mass, 2 * whole), whole_square)
        square = (square + tl.fma(-2 * ratio, rest_sum, rest_square)) * (unit / square_unit)
        tl.store(scatter + block, square)
    # All parts hold the same counts; the first one's are kept.
    if part == 0:
        tl.store(counts + place, count * unit)
        if not DIAG:
            tl.store(scatter + place, distance * (-2.0 * unit / product_unit))
