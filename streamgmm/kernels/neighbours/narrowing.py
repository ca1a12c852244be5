# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code that brings stored rows to fp16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def centred(rows, row, d, shift, live, D: tl.constexpr):
    """rows − shift of some rows and features, fp32; zero where not ``live``."""
    stored = tl.load(rows + row[:, None] * D + d[None, :], mask=live, other=0).to(tl.float32)
    return tl.where(live, stored - tl.load(shift + d, mask=d < D, other=0.0)[None, :], 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def narrow_rows(
    rows, shift, scale, x, halves, units, n_rows,
    D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """x (padded N, STRIDE) fp16 with (rows − shift)·scale = x/u; ``units`` u and ``halves`` ½‖x‖²/u, (padded N,) fp32.

    u is a power of two, 1 unless a row is so large that fp16 could not hold it: of each row its own, so that one
    outlier changes no other row. Halves are a little too large, so that what they are taken from is below zero.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    own_scale = tl.load(scale)
    largest = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, STRIDE, BLOCK_FEATURES):
        d = first + tl.arange(0, BLOCK_FEATURES)
        live = (row < n_rows)[:, None] & (d < D)[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(centred(rows, row, d, shift, live, D) * own_scale), axis=1))
    exponent = tl.maximum(((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127 - 7, 0)
    unit = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    norm = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, STRIDE, BLOCK_FEATURES):
        d = first + tl.arange(0, BLOCK_FEATURES)
        live = (row < n_rows)[:, None] & (d < D)[None, :]
        narrow = (centred(rows, row, d, shift, live, D) * own_scale * unit[:, None]).to(tl.float16)
        tl.store(x + row[:, None] * STRIDE + d[None, :], narrow)
        rounded = narrow.to(tl.float32)
        norm += tl.sum(rounded * rounded, axis=1)
    half = 0.5001 * norm * ((127 + exponent) << 23).to(tl.float32, bitcast=True) + 1e-30
    tl.store(halves + row, tl.minimum(half, 1e30))
    tl.store(units + row, unit)
