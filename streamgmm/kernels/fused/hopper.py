# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
r"""The log-sum-exp of `joint` in Gluon, for Hopper: a product is in flight while exponentials are taken.

Compiled from Triton, a product whose sum is carried round the loop is waited for where it begins, and exponentials come
after it. Here components go by in blocks of two tiles: while tensor cores multiply by one tile, the logits of the other
are reduced. Blocks come by TMA, STAGES of them on their way at once, each with a barrier that says when it is there.

Logits have the bits of those of `joint.logits`, which the second launch takes again: they begin at the same constant
terms, and one product takes all features, 16 at an instruction from the first on in either kernel. Whatever is changed
here must keep that. The sum of the exponentials is in another order, which moves lse by some 10⁻⁵ bits.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from streamgmm.kernels.fused.configs import COMPONENT_PADDING, COMPONENT_TILE
from streamgmm.kernels.fused.parameters import Coefficients
from streamgmm.kernels.fused.running import FLOOR
from streamgmm.kernels.fused.working import WorkingRows

# Two programs share a multiprocessor, of 4 warps and 100 KiB each. 256 rows, three or four stages, or a warp of its own
# for the copies were not faster (docs/log.md).
_ROWS, _WARPS, _STAGES = 128, 4, 2


def log_sum_exp(working: WorkingRows, theta: Coefficients) -> None:
    """Fill ``lse``, and ``maxima`` unless they are empty, as `joint.log_sum_exp` does without DIAG and SCALED.

    Where l has no norm, its coefficient is zero.
    """
    if working.n_padded == 0:  # a descriptor of nothing is an error
        return
    overlapped_log_sum_exp[(working.n_padded // _ROWS,)](
        _blocks(working.x, _ROWS), _blocks(theta.linear, COMPONENT_PADDING),
        _blocks(theta.terms, 2 * COMPONENT_PADDING), working.norms, working.lse, working.maxima,
        working.n_rows, len(theta.linear) // COMPONENT_PADDING, working.n_padded,
        MAXIMA=working.maxima.numel() > 0, ROWS=_ROWS, TILE=COMPONENT_TILE, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip


def _blocks(values: Tensor, length: int) -> TensorDescriptor:
    """``length`` rows of an fp16 matrix as TMA and products want them, or ``length`` numbers of an fp32 vector."""
    shape = (length, *values.shape[1:])
    return TensorDescriptor.from_tensor(values, list(shape), _layout(shape))


@cache
def _layout(shape: tuple[int, ...]) -> gl.NVMMASharedLayout:
    if len(shape) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return gl.NVMMASharedLayout.get_default_for(list(shape), gl.float16)


@gluon.jit
def fetch(theta, terms, block, theta_slot, terms_slot, arrived, pred):
    """Send for the parameters of a block of components."""
    mbarrier.expect(arrived, theta.block_type.nbytes + terms.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(theta, [block * theta.block_shape[0], 0], arrived, theta_slot, pred=pred)
    tma.async_copy_global_to_shared(terms, [block * terms.block_shape[0]], arrived, terms_slot, pred=pred)


@gluon.jit
def own_terms(terms_slot, first: gl.constexpr, TILE: gl.constexpr, by_column: gl.constexpr):
    """Constants and coefficients of the norm, (TILE,) each, of the components from ``first`` of a block on."""
    return terms_slot.slice(first, TILE).load(by_column), terms_slot.slice(2 * TILE + first, TILE).load(by_column)


@gluon.jit
def begin_logits(x, theta_slot, first: gl.constexpr, norm, constant, quadratic, TILE: gl.constexpr):
    """l (rows, TILE) of the components from ``first`` of a block on; `warpgroup_mma_wait` says when it is there."""
    acc = gl.expand_dims(constant, 0) + gl.expand_dims(norm, 1) * gl.expand_dims(quadratic, 0)
    return warpgroup_mma(x, theta_slot.slice(first, TILE).permute((1, 0)), acc, is_async=True)


@gluon.jit
def by_lanes(logit):
    """(rows, TILE) as (rows, TILE / 8, 4, 2): the first and last of a row's axes lie within a thread."""
    return gl.reshape(logit, [logit.shape[0], logit.shape[1] // 8, 4, 2])


@gluon.jit
def absorb(logit, largest, total, place, MAXIMA: gl.constexpr):
    """`running.add_exponentials` for each of a row's four lanes, (rows, 4): no shuffle keeps an exponential waiting."""
    lanes = by_lanes(logit)
    own = gl.max(gl.max(lanes, axis=3), axis=1)
    if MAXIMA:
        gl.store(place, gl.convert_layout(gl.max(own, axis=1), place.type.layout, assert_trivial=True))
    peak = gl.maximum(largest, own)
    exponentials = gl.exp2(lanes - gl.expand_dims(gl.expand_dims(peak, 1), 3))
    return peak, total * gl.exp2(largest - peak) + gl.sum(gl.sum(exponentials, axis=3), axis=1)


@gluon.jit(do_not_specialize=["n_rows", "n_blocks", "pitch"])
def overlapped_log_sum_exp(
    x, theta, terms, norms, lse, maxima, n_rows, n_blocks, pitch,
    MAXIMA: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """lse (padded N,) fp32, in bits: one program holds ROWS rows and sees every component, in blocks of 2·TILE.

    ``x`` (padded N, STRIDE) and ``theta`` (n_blocks · 2·TILE, STRIDE) fp16 and ``terms`` (n_blocks · 4·TILE,) fp32,
    `Coefficients.terms`, are descriptors; ``norms`` (padded N,) fp32. With MAXIMA,
    ``maxima`` (n_blocks · 2, pitch) gets the largest l of each row in each TILE components.

    One product is in flight at the loop's end, and no more: the compiler would serialise two. A product's constant
    terms are in registers before it begins. The branch behind its beginning, a wait or a guarded copy, keeps the
    compiler from moving the exponentials in front of it.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TILE, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    x_slot = gl.allocate_shared_memory(x.dtype, x.block_shape, x.layout)
    theta_slots = gl.allocate_shared_memory(theta.dtype, [STAGES, 2 * TILE, theta.block_shape[1]], theta.layout)
    terms_slots = gl.allocate_shared_memory(terms.dtype, [STAGES, 4 * TILE], terms.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(arrived.index(s), count=1)
    mbarrier.init(x_arrived, count=1)
    fence_async_shared()
    first_row = gl.program_id(0) * ROWS
    mbarrier.expect(x_arrived, x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [first_row, 0], x_arrived, x_slot)
    for s in gl.static_range(STAGES):
        fetch(theta, terms, s, theta_slots.index(s), terms_slots.index(s), arrived.index(s), s < n_blocks)

    row = first_row + gl.arange(0, ROWS, layout=by_row)
    norm = gl.load(norms + row)
    place = maxima + row
    largest = gl.max(gl.max(by_lanes(gl.full([ROWS, TILE], FLOOR, gl.float32, mma)), axis=3), axis=1)
    total = largest * 0.0
    mbarrier.wait(x_arrived, 0)
    mbarrier.wait(arrived.index(0), 0)
    c, q = own_terms(terms_slots.index(0), 0, TILE, by_column)
    flying = begin_logits(x_slot, theta_slots.index(0), 0, norm, c, q, TILE)
    c, q = own_terms(terms_slots.index(0), TILE, TILE, by_column)
    first = warpgroup_mma_wait(0, deps=[flying])
    slot = 0
    phase = 0
    for block in range(n_blocks - 1):
        flying = begin_logits(x_slot, theta_slots.index(slot), TILE, norm, c, q, TILE)
        freed = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
        mbarrier.wait(arrived.index(slot), phase)
        c, q = own_terms(terms_slots.index(slot), 0, TILE, by_column)
        largest, total = absorb(first, largest, total, place, MAXIMA)
        place += pitch
        second = warpgroup_mma_wait(0, deps=[flying])
        flying = begin_logits(x_slot, theta_slots.index(slot), 0, norm, c, q, TILE)
        gl.thread_barrier()  # all warps are done with the freed slot
        following = block + STAGES
        fetch(
            theta, terms, following, theta_slots.index(freed), terms_slots.index(freed), arrived.index(freed),
            following < n_blocks,
        )  # fmt: skip
        c, q = own_terms(terms_slots.index(slot), TILE, TILE, by_column)
        largest, total = absorb(second, largest, total, place, MAXIMA)
        place += pitch
        first = warpgroup_mma_wait(0, deps=[flying])
    flying = begin_logits(x_slot, theta_slots.index(slot), TILE, norm, c, q, TILE)
    largest, total = absorb(first, largest, total, place, MAXIMA)
    second = warpgroup_mma_wait(0, deps=[flying])
    largest, total = absorb(second, largest, total, place + pitch, MAXIMA)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(s))
    mbarrier.invalidate(x_arrived)
    peak = gl.max(largest, axis=1)
    whole = gl.sum(total * gl.exp2(largest - gl.expand_dims(peak, 1)), axis=1)
    own = gl.convert_layout(peak + gl.log2(whole), by_row, assert_trivial=True)
    gl.store(lse + row, gl.where(row < n_rows, own, float("inf")))
