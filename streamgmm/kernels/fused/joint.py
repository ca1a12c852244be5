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

from streamgmm.kernels.fused.running import FLOOR, add_exponentials, better_component, store_maxima


@triton.jit
def square_planes(x):
    """x² as hi + lo in x's type: exact for normal fp16 squares, whose 22 bits are two significands of 11."""
    wide = x.to(tl.float32)
    square = wide * wide
    high = square.to(x.dtype)
    return high, (square - high.to(tl.float32)).to(x.dtype)


@triton.jit
def dot_rows_first(acc, x, high, low, linear, quadratic, DIAG: tl.constexpr):
    """acc + φ(x)·θᵀ: planes (rows, S), θ (S, components) → (rows, components) fp32."""
    acc = tl.dot(x, linear, acc)
    if DIAG:
        acc = tl.dot(high, quadratic, acc)
        acc = tl.dot(low, quadratic, acc)
    return acc


@triton.jit
def dot_components_first(acc, x, high, low, linear, quadratic, DIAG: tl.constexpr):
    """acc + θ·φ(x)ᵀ: θ (components, S), planes (rows, S) → (components, rows) fp32."""
    acc = tl.dot(linear, tl.trans(x), acc)
    if DIAG:
        acc = tl.dot(quadratic, tl.trans(high), acc)
        acc = tl.dot(quadratic, tl.trans(low), acc)
    return acc


@triton.jit
def logits(
    x_rows, resident, high, low, norm, linear, quadratic, exponents, constants, k,
    STRIDE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """l of one tile, (rows, components k) fp32 bits; ``resident`` holds the rows where one step takes all features.

    The sum begins at its constant terms: tensor cores truncate, and what is left of the sum is smaller that way.
    """
    d = tl.arange(0, STEP)
    theta = k[None, :].to(tl.int64) * STRIDE
    acc = tl.load(constants + k)[None, :] + norm * (tl.load(quadratic + k)[None, :] if NORM else 0.0)
    if STEP == STRIDE:
        offset = theta + d[:, None]
        q = tl.load(quadratic + offset) if DIAG else 0
        acc = dot_rows_first(acc, resident, high, low, tl.load(linear + offset), q, DIAG)
    else:
        for first in range(0, STRIDE, STEP):
            offset = theta + (first + d)[:, None]
            part = tl.load(x_rows + (first + d)[None, :])
            h, lo = square_planes(part) if DIAG else (0, 0)
            q = tl.load(quadratic + offset) if DIAG else 0
            acc = dot_rows_first(acc, part, h, lo, tl.load(linear + offset), q, DIAG)
    if SCALED:
        acc *= tl.load(exponents + k)[None, :]
    return acc


@triton.jit(do_not_specialize=["n_rows", "n_tiles", "pitch"])
def log_sum_exp(
    x, norms, linear, quadratic, exponents, constants, lse, maxima, n_rows, n_tiles, pitch,
    STRIDE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    MAXIMA: tl.constexpr, TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """lse (padded N,) fp32, in bits: one program holds BLOCK_ROWS rows and sees every component.

    ``linear`` (padded K, STRIDE), ``quadratic`` likewise for diag or (padded K,) fp32 with NORM, ``exponents`` 2^{e_k}
    and ``constants`` (padded K,) fp32. With MAXIMA, ``maxima`` (padded K / TILE, pitch) gets the largest l of each row
    in each tile of components.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    x_rows = x + row[:, None] * STRIDE
    resident = tl.load(x_rows + tl.arange(0, STEP)[None, :]) if STEP == STRIDE else 0
    high, low = square_planes(resident) if DIAG and STEP == STRIDE else (0, 0)
    norm = tl.load(norms + row)[:, None] if NORM else tl.zeros([BLOCK_ROWS, 1], tl.float32)
    largest = tl.full([BLOCK_ROWS], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for tile in range(n_tiles):
        k = tile * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
        logit = logits(
            x_rows, resident, high, low, norm, linear, quadratic, exponents, constants, k,
            STRIDE, STEP, DIAG, NORM, SCALED,
        )  # fmt: skip
        if MAXIMA:
            own = store_maxima(logit, maxima, tile, row, pitch, TILE, BLOCK_ROWS, BLOCK_COMPONENTS)
        else:
            own = tl.max(logit, axis=1)
        largest, total = add_exponentials(logit, own, largest, total)
    tl.store(lse + row, tl.where(row < n_rows, largest + tl.log2(total), float("inf")))


@triton.jit(do_not_specialize=["n_tiles", "n_components"])
def best_component(
    x, norms, linear, quadratic, exponents, constants, order, before, label_before, best, label, n_tiles, n_components,
    STRIDE: tl.constexpr, STEP: tl.constexpr, DIAG: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """The largest l of each row, ``best`` (padded N,) fp32, and its component, ``label`` (padded N,) int32.

    Unless FIRST, among those after (``before``, ``label_before``) in the order of falling l and rising component.
    ``order`` (padded K,) int32 holds the component in each place.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x_rows = x + row[:, None] * STRIDE
    resident = tl.load(x_rows + tl.arange(0, STEP)[None, :]) if STEP == STRIDE else 0
    high, low = square_planes(resident) if DIAG and STEP == STRIDE else (0, 0)
    norm = tl.load(norms + row)[:, None] if NORM else tl.zeros([BLOCK_ROWS, 1], tl.float32)
    last = 0.0 if FIRST else tl.load(before + row)[:, None]
    last_label = 0 if FIRST else tl.load(label_before + row)[:, None]
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_ROWS], tl.int32)
    for tile in range(n_tiles):
        k = tile * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
        logit = logits(
            x_rows, resident, high, low, norm, linear, quadratic, exponents, constants, k,
            STRIDE, STEP, DIAG, NORM, SCALED,
        )  # fmt: skip
        component = tl.load(order + k)[None, :]
        exists = (k < n_components)[None, :]
        largest, chosen = better_component(logit, component, exists, last, last_label, largest, chosen, FIRST)
    tl.store(best + row, largest)
    tl.store(label + row, chosen)
