# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that brings stored rows into the working frame, and finds those that do not fit it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _centred(rows, row, d, shift, scale, n_rows, D: tl.constexpr):
    """(rows − shift)·scale of some rows and features, fp32; zero outside. Subtracted in the type of ``shift``."""
    live = (row < n_rows)[:, None] & (d < D)[None, :]
    s = tl.load(shift + d)[None, :]
    c = tl.load(scale + d)[None, :]
    stored = tl.load(rows + row[:, None] * D + d[None, :], mask=live, other=0)
    return tl.where(live, (stored.to(s.dtype) - s) * c, 0.0).to(tl.float32)


@triton.jit
def _beyond(values, LIMIT: tl.constexpr):
    """1 for each row that holds a value beyond LIMIT, or none that is a number."""
    # Negated, so that NaN counts as beyond the limit.
    inside = tl.abs(values) <= LIMIT
    return tl.max(tl.where(inside, 0, 1), axis=1)


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
        wide = _centred(rows, row, d, shift, scale, n_rows, D)
        narrow = wide.to(x.dtype.element_ty)
        tl.store(x + row[:, None] * STRIDE + d[None, :], narrow)
        if not DIAG:
            rounded = narrow.to(tl.float32)
            norm += tl.sum(rounded * rounded, axis=1)
        if LIMIT > 0:
            beyond = tl.maximum(beyond, _beyond(wide, LIMIT))
    if not DIAG:
        tl.store(norms + row, norm)
    if LIMIT > 0:
        # Every program of a granule would store the same value: the order of the stores does not matter.
        tl.store(flags + first_row // GRANULE, 1, mask=tl.max(beyond, axis=0) > 0)


@triton.jit(do_not_specialize=["n_rows"])
def whiten_rows(
    rows, shift, scale, factor, factor_low, exponents, x, norms, flags, n_rows,
    D: tl.constexpr, STRIDE: tl.constexpr, GRANULE: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y = x'U in fp16, and ‖y‖² of the rounded y: coordinates in which the covariance of ``tied`` is one.

    U (STRIDE, STRIDE) is upper triangular and comes as ``factor`` + ``factor_low``, fp16, times 2^e for each column,
    ``exponents`` (STRIDE,) fp32. x' enters as hi + lo too: three products keep 21 bits of each. ``flags`` as in
    `convert_rows`.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    norm = tl.zeros([BLOCK_ROWS], tl.float32)
    beyond = tl.zeros([BLOCK_ROWS], tl.int32)
    for out in range(0, STRIDE, BLOCK_OUT):
        j = out + tl.arange(0, BLOCK_OUT)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
        for first in range(0, out + BLOCK_OUT, STEP):
            d = first + tl.arange(0, STEP)
            wide = _centred(rows, row, d, shift, scale, n_rows, D)
            high = wide.to(tl.float16)
            low = (wide - high.to(tl.float32)).to(tl.float16)
            place = d[:, None] * STRIDE + j[None, :]
            u = tl.load(factor + place)
            acc = tl.dot(high, u, acc)
            acc = tl.dot(low, u, acc)
            acc = tl.dot(high, tl.load(factor_low + place), acc)
        wide = acc * tl.load(exponents + j)[None, :]
        narrow = wide.to(tl.float16)
        tl.store(x + row[:, None] * STRIDE + j[None, :], narrow)
        rounded = narrow.to(tl.float32)
        norm += tl.sum(rounded * rounded, axis=1)
        beyond = tl.maximum(beyond, _beyond(wide, LIMIT))
    tl.store(norms + row, norm)
    tl.store(flags + first_row // GRANULE, 1, mask=tl.max(beyond, axis=0) > 0)


@triton.jit(do_not_specialize=["n_rows"])
def flag_far_rows(lse, flags, n_rows, FAR: tl.constexpr, GRANULE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """``flags`` (granules,) get a 1 where some |lse| exceeds FAR: fp32 no longer tells that row's components apart."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    far = tl.abs(tl.load(lse + row, mask=row < n_rows, other=0.0)) > FAR
    tl.store(flags + first_row // GRANULE, 1, mask=tl.max(tl.where(far, 1, 0), axis=0) > 0)


@triton.jit(do_not_specialize=["n_rows"])
def scale_weights(weights, scaled, units, n_rows, GRANULE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Weights (N,) fp64 as ``scaled`` (padded N,) fp32 in [0, 1] times a power of two a granule, ``units`` fp32."""
    granule = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK_ROWS], tl.float64)
    for first in range(0, GRANULE, BLOCK_ROWS):
        row = granule * GRANULE + first + tl.arange(0, BLOCK_ROWS)
        largest = tl.maximum(largest, tl.load(weights + row, mask=row < n_rows, other=0.0))
    peak = tl.max(largest, axis=0).to(tl.float32)
    unit = tl.where(peak > 0, tl.exp2(tl.ceil(tl.log2(tl.maximum(peak, 1e-30)))), 1.0)
    for first in range(0, GRANULE, BLOCK_ROWS):
        row = granule * GRANULE + first + tl.arange(0, BLOCK_ROWS)
        own = tl.load(weights + row, mask=row < n_rows, other=0.0).to(tl.float32)
        tl.store(scaled + row, own / unit, mask=row < n_rows)
    tl.store(units + granule, unit)
