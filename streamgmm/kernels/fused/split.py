# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
r"""Device code of ``high``, to the log-sum-exp: products of fp16 planes, exact where they are large.

Near its component a row's quadratic form is a small difference of large terms: at noise 0.05, tens against 10⁴. So
numbers are split into an integer and fractions (`split_parameters`), after Ozaki, Ogita, Oishi & Rump, Error-free
transformations of matrix multiplication (2012, doi:10.1007/s11075-011-9478-1):

    2^u x' = X₁ + X₂ + X₃,    2^v μ' = M₁ + M₂,    X₁, M₁ whole,  X₂, M₂ within ±½,  X₃ below 2⁻¹³,

    2^{u+v} x'·μ' = X₁·M₁ + (X₃·M₁ + X₂·M₂ + X₂·M₁ + X₁·M₂)     (X₃·M₂ is left out),

where fp16 products are exact and X₁·M₁ is a sum of integers below 2²⁴, exact in an fp32 accumulator in any order. The
norms −½‖x'‖², −½‖μ'‖², in the same units, are a whole number and a fraction each, from fp64. Adding whole to whole
first cancels exactly,

    t = ((X₁·M₁ + whole_n) + whole_k) + ((rest + rest_n) + rest_k),        l = f_k t + α_k,

and what is left is rounded only relative to the small terms and to t, the form itself. ``diag`` has θ for μ', adds
x'²·ϑ in the same manner, its squares split in units of their own, and has no row norms. Features are taken in slices,
each with its own norms and a t of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamgmm.kernels.fused.running import FLOOR, add_exponentials, better_component, store_maxima


@triton.jit
def planes_of(value):
    """fp64 as three fp16 planes: an integer, the rest to 11 bits, and what that lacks."""
    first = tl.floor(value + 0.5).to(tl.float32).to(tl.float16)
    rest = value - first.to(tl.float64)
    second = rest.to(tl.float32).to(tl.float16)
    third = (rest - second.to(tl.float64)).to(tl.float32).to(tl.float16)
    return first, second, third


@triton.jit(do_not_specialize=["n_rows", "n_padded"])
def split_rows(
    rows, shift, scale, x, norms, flags, n_rows, n_padded, row_unit, square_unit, product_unit, limit,
    D: tl.constexpr, STRIDE: tl.constexpr, SLICE: tl.constexpr, GRANULE: tl.constexpr, DIAG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Planes of x' = (rows − shift)·scale: (N, D) stored → ``x`` (3, padded N, STRIDE) fp16, or 6 planes for diag.

    ``shift`` and ``scale`` (STRIDE,) are fp64, whatever is stored. The units are powers of two. Diag's planes 3 to 5
    are those of the split x' squared; spherical gets ``norms`` (2, STRIDE / SLICE, padded N) fp32 of it, whole and
    rest. ``flags`` (granules,) gets a 1 where some |x'| exceeds ``limit`` or is not a number.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    plane = n_padded.to(tl.int64) * STRIDE
    beyond = tl.zeros([BLOCK_ROWS], tl.int32)
    row_length = 1.0 / row_unit
    for part in range(STRIDE // SLICE):
        norm = tl.zeros([BLOCK_ROWS], tl.float64)
        for first in range(part * SLICE, (part + 1) * SLICE, BLOCK_FEATURES):
            d = first + tl.arange(0, BLOCK_FEATURES)
            live = (row < n_rows)[:, None] & (d < D)[None, :]
            stored = tl.load(rows + row[:, None] * D + d[None, :], mask=live, other=0).to(tl.float64)
            wide = tl.where(live, (stored - tl.load(shift + d)[None, :]) * tl.load(scale + d)[None, :], 0.0)
            # Negated, so that NaN counts as beyond the limit.
            inside = tl.abs(wide) <= limit
            beyond = tl.maximum(beyond, tl.max(tl.where(inside, 0, 1), axis=1))
            x1, x2, x3 = planes_of(wide * row_unit)
            place = x + row[:, None] * STRIDE + d[None, :]
            tl.store(place, x1)
            tl.store(place + plane, x2)
            tl.store(place + 2 * plane, x3)
            own = (x1.to(tl.float64) + x2.to(tl.float64) + x3.to(tl.float64)) * row_length
            if DIAG:
                s1, s2, s3 = planes_of(own * own * square_unit)
                tl.store(place + 3 * plane, s1)
                tl.store(place + 4 * plane, s2)
                tl.store(place + 5 * plane, s3)
            else:
                norm += tl.sum(own * own, axis=1)
        if not DIAG:
            form = -0.5 * norm * product_unit
            whole = tl.floor(form + 0.5).to(tl.float32)
            place = norms + part * n_padded.to(tl.int64) + row
            tl.store(place, whole)
            tl.store(place + (STRIDE // SLICE) * n_padded.to(tl.int64), (form - whole.to(tl.float64)).to(tl.float32))
    # Every program of a granule would store the same value: the order of the stores does not matter.
    tl.store(flags + first_row // GRANULE, 1, mask=tl.max(beyond, axis=0) > 0)


@triton.jit
def split_rows_first(exact, rest, x1, x2, x3, m1, m2):
    """x (rows, S) planes times θ (S, components) planes, onto (rows, components) fp32; small products first."""
    rest = tl.dot(x3, m1, rest)
    rest = tl.dot(x2, m2, rest)
    rest = tl.dot(x2, m1, rest)
    rest = tl.dot(x1, m2, rest)
    return tl.dot(x1, m1, exact), rest


@triton.jit
def split_components_first(exact, rest, x1, x2, x3, m1, m2):
    """θ (components, S) planes times x (rows, S) planes, onto (components, rows): in `split_rows_first`'s order."""
    rest = tl.dot(m1, tl.trans(x3), rest)
    rest = tl.dot(m2, tl.trans(x2), rest)
    rest = tl.dot(m1, tl.trans(x2), rest)
    rest = tl.dot(m2, tl.trans(x1), rest)
    return tl.dot(m1, tl.trans(x1), exact), rest


@triton.jit
def split_form(exact, rest, whole_n, rest_n, whole_k, rest_k, DIAG: tl.constexpr):
    """t of one slice, (rows, components) or transposed fp32; the row's parts are not looked at for diag."""
    if not DIAG:
        exact = exact + whole_n
        rest = rest + rest_n
    return (exact + whole_k) + (rest + rest_k)


@triton.jit
def load_planes(base, offset, plane):
    """Three planes of a tile: a scalar ``base`` each and one tile of 32-bit ``offset`` spare registers."""
    return tl.load(base + offset), tl.load(base + plane + offset), tl.load(base + 2 * plane + offset)


@triton.jit
def load_pair(base, offset, plane):
    """Two planes of a tile."""
    return tl.load(base + offset), tl.load(base + plane + offset)


@triton.jit
def load_resident(x, own, plane, WHOLE: tl.constexpr, DIAG: tl.constexpr):
    """The planes of x, and for diag of x², where one step takes all features; what is not loaded is never used."""
    x1, x2, x3 = 0, 0, 0
    s1, s2, s3 = 0, 0, 0
    if WHOLE:
        x1, x2, x3 = load_planes(x, own, plane)
        if DIAG:
            s1, s2, s3 = load_planes(x + 3 * plane, own, plane)
    return x1, x2, x3, s1, s2, s3


@triton.jit
def form_rows_first(
    x, own, resident, norms, linear, quadratic, theta, energies, x_plane, k_plane, n_padded, n_components,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """t of one tile, (rows, components): scalar bases, and offsets ``own`` (rows, STEP) and ``theta`` (STEP, k).

    ``norms`` (rows, 1) and ``energies`` (1, k) point to the first slice. ``resident`` is `load_resident`'s.
    """
    slices: tl.constexpr = STRIDE // SLICE
    form = tl.zeros([BLOCK_ROWS, BLOCK_COMPONENTS], tl.float32)
    for part in range(slices):
        exact = tl.zeros([BLOCK_ROWS, BLOCK_COMPONENTS], tl.float32)
        rest = tl.zeros([BLOCK_ROWS, BLOCK_COMPONENTS], tl.float32)
        if STEP == STRIDE:
            m1, m2 = load_pair(linear, theta, k_plane)
            exact, rest = split_rows_first(exact, rest, resident[0], resident[1], resident[2], m1, m2)
            if DIAG:
                q1, q2 = load_pair(quadratic, theta, k_plane)
                exact, rest = split_rows_first(exact, rest, resident[3], resident[4], resident[5], q1, q2)
        else:
            for first in range(part * SLICE, (part + 1) * SLICE, STEP):
                a1, a2, a3 = load_planes(x + first, own, x_plane)
                b1, b2 = load_pair(linear + first, theta, k_plane)
                exact, rest = split_rows_first(exact, rest, a1, a2, a3, b1, b2)
                if DIAG:
                    c1, c2, c3 = load_planes(x + 3 * x_plane + first, own, x_plane)
                    e1, e2 = load_pair(quadratic + first, theta, k_plane)
                    exact, rest = split_rows_first(exact, rest, c1, c2, c3, e1, e2)
        whole_k, rest_k = load_pair(energies, part * n_components, slices * n_components)
        whole_n, rest_n = 0.0, 0.0
        if not DIAG:
            whole_n, rest_n = load_pair(norms, part * n_padded.to(tl.int64), slices * n_padded.to(tl.int64))
        form += split_form(exact, rest, whole_n, rest_n, whole_k, rest_k, DIAG)
    return form


@triton.jit(do_not_specialize=["n_rows", "n_padded", "n_components"])
def split_log_sum_exp(
    x, norms, linear, quadratic, energies, factors, constants, lse, maxima, n_rows, n_padded, n_components,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr,
    MAXIMA: tl.constexpr, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """lse (padded N,) fp32, in bits less the parameters' offset: a program holds BLOCK_ROWS rows, sees every component.

    Arguments as `split_rows` writes them and `SplitCoefficients` has them; ``n_components`` is the padded K. With
    MAXIMA, ``maxima`` (padded K / TILE, padded N) gets the largest l of each row in each tile of components.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, STEP)
    x_plane = n_padded.to(tl.int64) * STRIDE
    k_plane = n_components.to(tl.int64) * STRIDE
    x += first_row * STRIDE
    own = tl.arange(0, BLOCK_ROWS)[:, None] * STRIDE + d[None, :]
    theta = tl.arange(0, BLOCK_COMPONENTS)[None, :] * STRIDE + d[:, None]
    resident = load_resident(x, own, x_plane, STEP == STRIDE, DIAG)
    largest = tl.full([BLOCK_ROWS], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first_k in range(0, n_components, BLOCK_COMPONENTS):
        k = first_k + tl.arange(0, BLOCK_COMPONENTS)
        form = form_rows_first(
            x, own, resident, norms + row[:, None], linear, quadratic, theta, energies + k[None, :],
            x_plane, k_plane, n_padded, n_components, STRIDE, SLICE, STEP, DIAG, BLOCK_ROWS, BLOCK_COMPONENTS,
        )  # fmt: skip
        logit = tl.fma(form, tl.load(factors + k)[None, :], tl.load(constants + k)[None, :])
        if MAXIMA:
            tile = first_k // BLOCK_COMPONENTS
            peak = store_maxima(logit, maxima, tile, row, n_padded, TILE, BLOCK_ROWS, BLOCK_COMPONENTS)
        else:
            peak = tl.max(logit, axis=1)
        largest, total = add_exponentials(logit, peak, largest, total)
        linear += BLOCK_COMPONENTS * STRIDE
        if DIAG:
            quadratic += BLOCK_COMPONENTS * STRIDE
    tl.store(lse + row, tl.where(row < n_rows, largest + tl.log2(total), float("inf")))


@triton.jit(do_not_specialize=["n_padded", "n_components", "n_real"])
def split_best_component(
    x, norms, linear, quadratic, energies, factors, constants, order, before, label_before, best, label,
    n_padded, n_components, n_real,
    STRIDE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr,
    FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """The largest l of each row, ``best`` (padded N,) fp32, and its component, ``label`` (padded N,) int32.

    Unless FIRST, among those after (``before``, ``label_before``) in the order of falling l and rising component.
    ``order`` (padded K,) int32 holds the component in each place, the first ``n_real`` of which are none of padding.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, STEP)
    x_plane = n_padded.to(tl.int64) * STRIDE
    k_plane = n_components.to(tl.int64) * STRIDE
    x += first_row * STRIDE
    own = tl.arange(0, BLOCK_ROWS)[:, None] * STRIDE + d[None, :]
    theta = tl.arange(0, BLOCK_COMPONENTS)[None, :] * STRIDE + d[:, None]
    resident = load_resident(x, own, x_plane, STEP == STRIDE, DIAG)
    last = 0.0 if FIRST else tl.load(before + row)[:, None]
    last_label = 0 if FIRST else tl.load(label_before + row)[:, None]
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_ROWS], tl.int32)
    for first_k in range(0, n_components, BLOCK_COMPONENTS):
        k = first_k + tl.arange(0, BLOCK_COMPONENTS)
        form = form_rows_first(
            x, own, resident, norms + row[:, None], linear, quadratic, theta, energies + k[None, :],
            x_plane, k_plane, n_padded, n_components, STRIDE, SLICE, STEP, DIAG, BLOCK_ROWS, BLOCK_COMPONENTS,
        )  # fmt: skip
        logit = tl.fma(form, tl.load(factors + k)[None, :], tl.load(constants + k)[None, :])
        component = tl.load(order + k)[None, :]
        exists = (k < n_real)[None, :]
        largest, chosen = better_component(logit, component, exists, last, last_label, largest, chosen, FIRST)
        linear += BLOCK_COMPONENTS * STRIDE
        if DIAG:
            quadratic += BLOCK_COMPONENTS * STRIDE
    tl.store(best + row, largest)
    tl.store(label + row, chosen)
