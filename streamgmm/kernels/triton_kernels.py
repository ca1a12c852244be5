# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
r"""Device code of the fused E-step for ``spherical`` and ``diag``.

A row x is held centred and scaled, x' (N, STRIDE), zero past D. With θ, α of `natural.natural_parameters` times
log₂ e, the log joint density in bits is

    l_nk = 2^{e_k} (x'_n·θ_k [+ x'²_n·ϑ_k]) + ‖x'_n‖² q_k + α_k,        lse_n = log₂ Σ_k 2^{l_nk},

where the bracket belongs to ``diag`` and the norm to ``spherical``; responsibilities are r_nk = 2^{l_nk − lse_n}
(Bishop 2006, eqs. 9.13 and 9.17–9.28). The running maximum and sum over k are Milakov & Gimelshein's online
normaliser (2018, arXiv:1805.02867, algorithm 3).

Rows and components are padded to whole tiles, so no inner loop has a mask: rows past N have lse = +inf and components
past K have α = −inf, and either makes r = 0. Parameters are runtime arguments unless they shape a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp2(-inf - (-inf)) is NaN: the running maximum starts at a finite value instead, below any logit.
_FLOOR = tl.constexpr(-3.0e38)
# A responsibility of 2⁻²⁹ is still a normal fp16 number after this factor, and 1 is far from overflow.
_RESP_SCALE = tl.constexpr(32768.0)


@triton.jit(do_not_specialize=["n_rows"])
def convert_rows(
    rows, shift, scale, x, norms, flags, n_rows,
    D: tl.constexpr, STRIDE: tl.constexpr, GRANULE: tl.constexpr, LIMIT: tl.constexpr, DIAG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """x' = (rows − shift)·scale, (N, D) stored → (padded N, STRIDE) working; ‖x'‖² (N,) fp32 of the rounded x'.

    ``shift`` and ``scale`` (STRIDE,) are fp64 for float64 rows and fp32 otherwise, and set the type of the
    subtraction. With LIMIT > 0, ``flags`` (granules,) gets a 1 where some |x'| exceeds it or is not a number.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    norm = tl.zeros([BLOCK_ROWS], tl.float32)
    beyond = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, STRIDE, BLOCK_FEATURES):
        d = first + tl.arange(0, BLOCK_FEATURES)
        live = (row < n_rows)[:, None] & (d < D)[None, :]
        s = tl.load(shift + d)[None, :]
        c = tl.load(scale + d)[None, :]
        stored = tl.load(rows + row[:, None] * D + d[None, :], mask=live, other=0)
        wide = tl.where(live, (stored.to(s.dtype) - s) * c, 0.0).to(tl.float32)
        narrow = wide.to(x.dtype.element_ty)
        tl.store(x + row[:, None] * STRIDE + d[None, :], narrow)
        if not DIAG:
            rounded = narrow.to(tl.float32)
            norm += tl.sum(rounded * rounded, axis=1)
        if LIMIT > 0:
            # Negated, so that NaN counts as beyond the limit.
            inside = tl.abs(wide) <= LIMIT
            beyond = tl.maximum(beyond, tl.max(tl.where(inside, 0, 1), axis=1))
    if not DIAG:
        tl.store(norms + row, norm)
    if LIMIT > 0:
        # Every program of a granule would store the same value: the order of the stores does not matter.
        tl.store(flags + first_row // GRANULE, 1, mask=tl.max(beyond, axis=0) > 0)


@triton.jit
def _square_parts(x):
    """x² as hi + lo in x's type: exact for normal fp16 squares, whose 22 bits are two significands of 11."""
    wide = x.to(tl.float32)
    square = wide * wide
    high = square.to(x.dtype)
    return high, (square - high.to(tl.float32)).to(x.dtype)


@triton.jit
def _dot_rows_first(acc, x, linear, quadratic, DIAG: tl.constexpr, PRECISION: tl.constexpr):
    """acc + φ(x)·θᵀ: x (rows, S), θ (S, components) → (rows, components) fp32."""
    acc = tl.dot(x, linear, acc, input_precision=PRECISION)
    if DIAG:
        if x.dtype == tl.float16:
            high, low = _square_parts(x)
            acc = tl.dot(high, quadratic, acc, input_precision=PRECISION)
            acc = tl.dot(low, quadratic, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x * x, quadratic, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dot_components_first(acc, x, linear, quadratic, DIAG: tl.constexpr, PRECISION: tl.constexpr):
    """acc + θ·φ(x)ᵀ: θ (components, S), x (rows, S) → (components, rows) fp32."""
    acc = tl.dot(linear, tl.trans(x), acc, input_precision=PRECISION)
    if DIAG:
        if x.dtype == tl.float16:
            high, low = _square_parts(x)
            acc = tl.dot(quadratic, tl.trans(high), acc, input_precision=PRECISION)
            acc = tl.dot(quadratic, tl.trans(low), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(quadratic, tl.trans(x * x), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def log_sum_exp(
    x, norms, linear, quadratic, exponents, constants, lse, n_rows, n_tiles,
    STRIDE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """lse (padded N,) fp32, in bits: one program holds BLOCK_ROWS rows and sees every component.

    ``linear`` (padded K, STRIDE), ``quadratic`` likewise for diag or (padded K,) fp32 for spherical,
    ``exponents`` 2^{e_k} and ``constants`` (padded K,) fp32.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    lane = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, STEP)
    x_rows = x + first_row * STRIDE + lane[:, None] * STRIDE
    resident = tl.load(x_rows + d[None, :]) if STEP == STRIDE else 0
    norm = 0.0 if DIAG else tl.load(norms + first_row + lane)[:, None]
    largest = tl.full([BLOCK_ROWS], _FLOOR, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for tile in range(n_tiles):
        k = tile * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
        theta = k[None, :].to(tl.int64) * STRIDE
        acc = tl.zeros([BLOCK_ROWS, BLOCK_COMPONENTS], tl.float32)
        if STEP == STRIDE:
            offset = theta + d[:, None]
            q = tl.load(quadratic + offset) if DIAG else 0
            acc = _dot_rows_first(acc, resident, tl.load(linear + offset), q, DIAG, PRECISION)
        else:
            for first in range(0, STRIDE, STEP):
                offset = theta + (first + d)[:, None]
                q = tl.load(quadratic + offset) if DIAG else 0
                part = tl.load(x_rows + (first + d)[None, :])
                acc = _dot_rows_first(acc, part, tl.load(linear + offset), q, DIAG, PRECISION)
        base = tl.load(constants + k)[None, :]
        if not DIAG:
            base = norm * tl.load(quadratic + k)[None, :] + base
        logit = acc * tl.load(exponents + k)[None, :] + base
        peak = tl.maximum(largest, tl.max(logit, axis=1))
        total = total * tl.exp2(largest - peak) + tl.sum(tl.exp2(logit - peak[:, None]), axis=1)
        largest = peak
    row = first_row + lane
    tl.store(lse + row, tl.where(row < n_rows, largest + tl.log2(total), float("inf")))


@triton.jit(do_not_specialize=["n_rows", "first_component", "n_slices"])
def accumulate(
    x, norms, lse, linear, quadratic, exponents, constants, counts, sums, scatter, n_rows, first_component, n_slices,
    STRIDE: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr, GRANULE: tl.constexpr,
    DIAG: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """One granule's Σ r, Σ r x', Σ r x'² (or Σ r ‖x'‖²): a program owns a tile of components and a slice of features.

    Grid (component tiles · slices, granules). ``counts`` (granules, K'), ``sums`` (granules, K', STRIDE), ``scatter``
    as ``sums`` for diag or as ``counts`` for spherical, fp32, where K' components are covered by the grid and begin
    at ``first_component``. ``n_rows`` is a whole number of BLOCK_ROWS.
    """
    part = tl.program_id(0) % n_slices
    tile = tl.program_id(0) // n_slices
    granule = tl.program_id(1)
    covered = (tl.num_programs(0) // n_slices) * BLOCK_COMPONENTS

    own = tile * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    k = first_component + own
    d = tl.arange(0, STEP)
    lane = tl.arange(0, BLOCK_ROWS)
    own_features = part * SLICE + tl.arange(0, SLICE)
    theta = k[:, None].to(tl.int64) * STRIDE
    exponent = tl.load(exponents + k)[:, None]
    constant = tl.load(constants + k)[:, None]
    q = 0.0 if DIAG else tl.load(quadratic + k)[:, None]
    resident = tl.load(linear + theta + d[None, :]) if STEP == STRIDE else 0
    resident_quadratic = tl.load(quadratic + theta + d[None, :]) if STEP == STRIDE and DIAG else 0

    count = tl.zeros([BLOCK_COMPONENTS], tl.float32)
    weighted = tl.zeros([BLOCK_COMPONENTS, SLICE], tl.float32)
    squared = tl.zeros([BLOCK_COMPONENTS, SLICE], tl.float32) if DIAG else tl.zeros([BLOCK_COMPONENTS], tl.float32)

    start = granule.to(tl.int64) * GRANULE
    x += start * STRIDE
    lse += start
    norms += start
    steps = tl.minimum(GRANULE, n_rows - granule * GRANULE)
    for first_row in range(0, steps, BLOCK_ROWS):
        row = first_row + lane
        x_rows = x + row[:, None] * STRIDE
        acc = tl.zeros([BLOCK_COMPONENTS, BLOCK_ROWS], tl.float32)
        if STEP == STRIDE:
            own_x = tl.load(x_rows + d[None, :])
            acc = _dot_components_first(acc, own_x, resident, resident_quadratic, DIAG, PRECISION)
        else:
            for first in range(0, STRIDE, STEP):
                offset = (first + d)[None, :]
                piece = tl.load(x_rows + offset)
                piece_quadratic = tl.load(quadratic + theta + offset) if DIAG else 0
                piece_linear = tl.load(linear + theta + offset)
                acc = _dot_components_first(acc, piece, piece_linear, piece_quadratic, DIAG, PRECISION)
            own_x = tl.load(x_rows + own_features[None, :])
        base = constant
        if not DIAG:
            norm = tl.load(norms + row)[None, :]
            base = norm * q + constant
        # The logit has the bits of the first launch: every sum here is in that one's order, and lse comes last.
        resp = tl.exp2(acc * exponent + base - tl.load(lse + row)[None, :])
        if own_x.dtype == tl.float16:
            # Everything below uses the rounded value: counts and products then describe the same responsibilities.
            rounded = (resp * _RESP_SCALE).to(tl.float16)
            resp = rounded.to(tl.float32)
        else:
            rounded = resp
        count += tl.sum(resp, axis=1)
        weighted = tl.dot(rounded, own_x, weighted, input_precision=PRECISION)
        if DIAG:
            if own_x.dtype == tl.float16:
                high, low = _square_parts(own_x)
                squared = tl.dot(rounded, high, squared, input_precision=PRECISION)
                squared = tl.dot(rounded, low, squared, input_precision=PRECISION)
            else:
                squared = tl.dot(rounded, own_x * own_x, squared, input_precision=PRECISION)
        else:
            squared += tl.sum(resp * norm, axis=1)

    unit = 1.0 / _RESP_SCALE if x.dtype.element_ty == tl.float16 else 1.0
    place = granule.to(tl.int64) * covered + own
    tl.store(sums + place[:, None] * STRIDE + own_features[None, :], weighted * unit)
    if DIAG:
        tl.store(scatter + place[:, None] * STRIDE + own_features[None, :], squared * unit)
    # All slices hold the same counts; the first one's are kept.
    if part == 0:
        tl.store(counts + place, count * unit)
        if not DIAG:
            tl.store(scatter + place, squared * unit)


@triton.jit(do_not_specialize=["n_rows"])
def flag_far_rows(lse, flags, n_rows, FAR: tl.constexpr, GRANULE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """``flags`` (granules,) get a 1 where some |lse| exceeds FAR: fp32 no longer tells that row's components apart."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    far = tl.abs(tl.load(lse + row, mask=row < n_rows, other=0.0)) > FAR
    tl.store(flags + first_row // GRANULE, 1, mask=tl.max(tl.where(far, 1, 0), axis=0) > 0)


@triton.jit(do_not_specialize=["n_rows"])
def sum_log_likelihood(lse, out, n_rows, GRANULE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """out (granules,) fp64: Σ lse of one granule's rows, from bits to nats, in an order that N does not change."""
    granule = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for first_row in range(0, GRANULE, BLOCK_ROWS):
        row = granule * GRANULE + first_row + tl.arange(0, BLOCK_ROWS)
        total += tl.load(lse + row, mask=row < n_rows, other=0.0).to(tl.float64)
    tl.store(out + granule, tl.sum(total, axis=0) * 0.6931471805599453)


@triton.jit(do_not_specialize=["size", "width", "padded_width", "n_granules", "pitch"])
def add_partials(total, partials, size, width, padded_width, n_granules, pitch, BLOCK: tl.constexpr):
    """total (size / width, width) fp64 += partials (granules, ·, padded_width), one granule after the other.

    ``pitch`` elements lie between granules. The order is that of the rows whatever a call covers.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    place = (i // width).to(tl.int64) * padded_width + i % width
    acc = tl.load(total + i, mask=live, other=0.0)
    for _ in range(n_granules):
        acc += tl.load(partials + place, mask=live, other=0.0).to(tl.float64)
        place += pitch
    tl.store(total + i, acc, mask=live)
