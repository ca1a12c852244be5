# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Device code over tiles of logits (rows, components): log-sum-exp, tile maxima, the best component; and r's unit."""

from __future__ import annotations

import triton
import triton.language as tl

# exp2(-inf - (-inf)) is NaN: the running maximum starts at a finite value instead, below any logit.
FLOOR = tl.constexpr(-3.0e38)
_LAST = tl.constexpr(2**31 - 1)
# A responsibility of 2⁻²⁹ is still a normal fp16 number after this factor, and 1 is far from overflow.
RESP_SCALE = tl.constexpr(32768.0)


@triton.jit
def add_exponentials(logit, own, largest, total):
    """Largest logit so far, and Σ 2^l relative to it (rows,), after a tile whose largest is ``own``."""
    peak = tl.maximum(largest, own)
    return peak, total * tl.exp2(largest - peak) + tl.sum(tl.exp2(logit - peak[:, None]), axis=1)


@triton.jit
def store_maxima(
    logit, maxima, tile, row, pitch, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr
):
    """Store the largest logit of each TILE components in ``maxima`` (tiles, pitch); return the largest of all."""
    TILES: tl.constexpr = BLOCK_COMPONENTS // TILE
    each = tl.max(tl.reshape(logit, [BLOCK_ROWS, TILES, TILE]), axis=2)
    own_tile = (tile * TILES + tl.arange(0, TILES)).to(tl.int64)
    tl.store(maxima + own_tile[None, :] * pitch + row[:, None], each)
    return tl.max(each, axis=1)


@triton.jit
def better_component(logit, component, exists, last, last_label, largest, chosen, FIRST: tl.constexpr):
    """The largest logit so far and its component (rows,), after a tile.

    Unless FIRST, among those after (``last``, ``last_label``) in the order of falling logit and rising component.
    A component of weight zero is still one; padding, which does not exist, is not.
    """
    logit = tl.where(exists, tl.maximum(logit, FLOOR), float("-inf"))
    if not FIRST:
        after = (logit < last) | ((logit == last) & (component > last_label))
        logit = tl.where(after, logit, float("-inf"))
    own = tl.max(logit, axis=1)
    own_label = tl.min(tl.where(logit == own[:, None], component, _LAST), axis=1)
    better = (own > largest) | ((own == largest) & (own_label < chosen))
    return tl.maximum(largest, own), tl.where(better, own_label, chosen)
