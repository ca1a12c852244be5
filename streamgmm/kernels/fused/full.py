# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
r"""Device code of the fused E-step for ``full``: logits of the pairs that matter, then sums over the live ones.

A row x' is held as `rows.convert_rows` leaves it. With P_k = U_k U_kᵀ the precision in the frame, U_k upper triangular,
and h_k = 2^{−e_k} √(½ log₂ e) U_k rounded to fp16, the log joint density in bits is

    l_nk = α_k − 2^{2e_k} ‖x'_n h_k − b_k‖²,    b_k = μ'_k h_k,    r_nk = 2^{l_nk − lse_n},    lse_n = log₂ Σ_k 2^{l_nk}

(Bishop 2006, eqs. 2.43, 9.13 and 9.17–9.28). A triangle is stored as square blocks, those below the diagonal left out:
block (i, j ≥ i) lies at j(j+1)/2 + i. The logits of a strip of rows are written down, (K', rows); responsibilities
below 2⁻²⁴/K are dropped, so a row loses less than 2⁻²⁴ of itself, and what lives is listed in place of the logits.

Of several blocks the first gives a bound, as h is upper triangular: α − 2^{2e} ‖(x'h − b)₀‖² ≥ l is the logit less what
the other features take off, and costs one block's product. The whole logit of each row's largest bound is at most lse.
What lies 24 + log₂ K bits below it is dropped anyway and is never completed: its bound stays in its place, which adds
less than 2⁻²⁴ to a row's density. Listed pairs are completed one by one, or all of a granule where they are many.

Scatter is summed about c_k, the component's mean rounded to fp16, and moved to the frame's origin in fp64: differences
are small where r is not, so neither rounding to fp16 nor the fp32 sums cancel against ‖μ'‖².
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp2(-inf - (-inf)) is NaN: the running maximum starts at a finite value instead, below any logit.
_FLOOR = tl.constexpr(-3.0e38)
_NO_COMPONENT = tl.constexpr(2**31 - 1)
# The largest r of a list lies in [2¹⁴, 2¹⁵].
_TOP_EXPONENT = tl.constexpr(14)
_PRODUCT_EXPONENT = tl.constexpr(9)
_PRODUCT_UNIT = tl.constexpr(2.0**-9)
# Partial sums of r d that a program keeps side by side.
_LANES = tl.constexpr(16)
_NATS = tl.constexpr(0.6931471805599453)


@triton.jit
def order_features(x, order, out, peaks, lower, STRIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """``out`` (pitch, STRIDE) fp16 = the features of ``x`` in ``order`` (STRIDE,) int32; both (pitch,) maxima begin."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, STRIDE)
    tl.store(out + row[:, None] * STRIDE + d[None, :], tl.load(x + row[:, None] * STRIDE + tl.load(order + d)[None, :]))
    tl.store(peaks + row, float("-inf"))
    tl.store(lower + row, float("-inf"))


@triton.jit(do_not_specialize=["n_components", "group", "dense_above"])
def log_joint(
    x, factors, offsets, squares, constants, strip, peaks, survivors, pitch, n_components, group, dense_above,
    STRIDE: tl.constexpr, SIDE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """strip (K', pitch) fp32 = l: a program holds BLOCK_ROWS rows and sees ``group`` components, some at a time.

    Grid (row tiles, groups). ``x`` (pitch, STRIDE) fp16, ``factors`` (K', blocks, SIDE, SIDE) fp16 as h, ``offsets``
    (K', STRIDE) as b, ``squares`` 2^{2e} and ``constants`` α (K',) fp32. ``group`` and K' are whole BLOCK_COMPONENTS.
    Only block columns FIRST to LAST are taken off. Where others remain, the bounds' maxima go to ``peaks`` (pitch,);
    where others came before, strip holds the bounds, and granules of up to ``dense_above`` survivors are left alone.
    """
    N_BLOCKS: tl.constexpr = STRIDE // SIDE
    SIZE: tl.constexpr = N_BLOCKS * (N_BLOCKS + 1) // 2 * SIDE * SIDE
    first_row = tl.program_id(0) * BLOCK_ROWS
    if FIRST > 0:  # noqa: SIM102 - decided when compiled
        if tl.load(survivors + first_row // GRANULE) <= dense_above:
            return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    side = tl.arange(0, SIDE)
    # Several components' columns side by side make one wide product.
    lane = tl.arange(0, BLOCK_COMPONENTS * SIDE)
    own = lane // SIDE
    column = lane % SIDE
    resident: tl.tuple = ()
    for i in tl.static_range(LAST):
        resident += (tl.load(x + row[:, None] * STRIDE + i * SIDE + side[None, :]),)
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    begin = tl.program_id(1) * group
    for first in range(begin, tl.minimum(begin + group, n_components), BLOCK_COMPONENTS):
        factor = factors + ((first + own).to(tl.int64) * SIZE + column)[None, :] + side[:, None] * SIDE
        offset = offsets + (first + own) * STRIDE + column
        distance = tl.zeros([BLOCK_ROWS, BLOCK_COMPONENTS], tl.float32)
        for j in tl.static_range(FIRST, LAST):
            acc = tl.zeros([BLOCK_ROWS, BLOCK_COMPONENTS * SIDE], tl.float32)
            for i in tl.static_range(j + 1):
                acc = tl.dot(resident[i], tl.load(factor + (j * (j + 1) // 2 + i) * SIDE * SIDE), acc)
            difference = acc - tl.load(offset + j * SIDE)[None, :]
            square = tl.reshape(difference * difference, [BLOCK_ROWS, BLOCK_COMPONENTS, SIDE])
            distance += tl.sum(square, axis=2)
        k = first + tl.arange(0, BLOCK_COMPONENTS)
        place = strip + k.to(tl.int64)[None, :] * pitch + row[:, None]
        bound = tl.load(place) if FIRST > 0 else tl.load(constants + k)[None, :]
        logit = bound - distance * tl.load(squares + k)[None, :]
        tl.store(place, logit)
        if LAST < N_BLOCKS:
            peak = tl.maximum(peak, tl.max(logit, axis=1))
    if LAST < N_BLOCKS:
        # A maximum is the same in any order.
        tl.atomic_max(peaks + row, peak, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "margin"])
def list_survivors(
    strip, references, lists, lengths, survivors, pitch, n_rows, margin,
    GRANULE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Each component's rows, in order, whose bound is at least their ``references`` (pitch,) fp32 less ``margin``.

    Grid (K, granules). ``lists`` (granules, K, CAPACITY) int16 as unsigned rows of the granule; a longer one is of no
    use, and only its length is kept. ``lengths`` (granules, K) int32, ``survivors`` (granules,) int32 their sums.
    """
    granule = tl.program_id(1)
    start = granule * GRANULE
    bounds = strip + tl.program_id(0).to(tl.int64) * pitch + start
    slot = granule * tl.num_programs(0) + tl.program_id(0)
    lists += slot.to(tl.int64) * CAPACITY
    steps = tl.minimum(GRANULE, n_rows - start)
    length = 0
    for first in range(0, steps, BLOCK_ROWS):
        place = first + tl.arange(0, BLOCK_ROWS)
        live = place < steps
        bound = tl.load(bounds + place, mask=live, other=float("-inf"))
        reference = tl.load(references + start + place, mask=live, other=0.0)
        kept = (bound >= reference - margin) & (bound > float("-inf"))
        one = tl.where(kept, 1, 0)
        target = length + tl.cumsum(one, axis=0) - 1
        tl.store(lists + target, place.to(tl.int16), mask=kept & (target < CAPACITY))
        length += tl.sum(one, axis=0)
    tl.store(lengths + slot, length)
    # A sum of integers is the same in any order.
    tl.atomic_add(survivors + granule, length, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "dense_above"])
def complete(
    x, factors, offsets, squares, strip, lists, lengths, survivors, lower, pitch, n_rows, dense_above,
    STRIDE: tl.constexpr, SIDE: tl.constexpr, FIRST: tl.constexpr, GRANULE: tl.constexpr, CAPACITY: tl.constexpr,
    REFERENCE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Take block columns from FIRST off the listed bounds; a list that was too long stands for all rows.

    Grid (K, granules). With REFERENCE ``lower`` (pitch,) fp32 takes the largest logit of each row and the strip stays;
    otherwise the strip gets the logits, and granules of more than ``dense_above`` survivors are `log_joint`'s.
    """
    N_BLOCKS: tl.constexpr = STRIDE // SIDE
    SIZE: tl.constexpr = N_BLOCKS * (N_BLOCKS + 1) // 2 * SIDE * SIDE
    k = tl.program_id(0)
    granule = tl.program_id(1)
    if not REFERENCE:  # noqa: SIM102 - decided when compiled
        if tl.load(survivors + granule) > dense_above:
            return
    slot = granule * tl.num_programs(0) + k
    listed = tl.load(lengths + slot)
    whole = listed > CAPACITY
    start = granule * GRANULE
    length = tl.where(whole, tl.minimum(GRANULE, n_rows - start), listed)
    lists += slot.to(tl.int64) * CAPACITY
    x += start.to(tl.int64) * STRIDE
    bounds = strip + k.to(tl.int64) * pitch + start
    lane = tl.arange(0, BLOCK_ROWS)
    side = tl.arange(0, SIDE)
    factor = factors + k.to(tl.int64) * SIZE + side[:, None] * SIDE + side[None, :]
    offset = offsets + k * STRIDE + side
    unit = tl.load(squares + k)
    for first in range(0, length, BLOCK_ROWS):
        place = first + lane
        live = place < length
        entry = tl.load(lists + place, mask=live & (not whole), other=0).to(tl.int32) & 0xFFFF
        row = tl.where(whole & live, place, entry)
        distance = tl.zeros([BLOCK_ROWS], tl.float32)
        resident: tl.tuple = ()
        for i in tl.static_range(N_BLOCKS):
            resident += (tl.load(x + row[:, None] * STRIDE + i * SIDE + side[None, :]),)
        for j in tl.static_range(FIRST, N_BLOCKS):
            acc = tl.zeros([BLOCK_ROWS, SIDE], tl.float32)
            for i in tl.static_range(j + 1):
                acc = tl.dot(resident[i], tl.load(factor + (j * (j + 1) // 2 + i) * SIDE * SIDE), acc)
            difference = acc - tl.load(offset + j * SIDE)[None, :]
            distance += tl.sum(difference * difference, axis=1)
        logit = tl.load(bounds + row, mask=live, other=0.0) - distance * unit
        if REFERENCE:
            # A maximum is the same in any order.
            tl.atomic_max(lower + start + row, logit, mask=live, sem="relaxed")
        else:
            tl.store(bounds + row, logit, mask=live)


@triton.jit(do_not_specialize=["n_rows", "n_components"])
def normalise(
    strip, peaks, log_totals, flags, pitch, n_rows, n_components,
    FAR: tl.constexpr, GRANULE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """lse = peak + log_total, (pitch,) fp32 each, in bits; ``flags`` (granules,) get a 1 where some |lse| exceeds FAR.

    Apart, the two keep Σ_k r at one within fp32's rounding however far the density is from one. The online normaliser
    of Milakov & Gimelshein (2018, arXiv:1805.02867, algorithm 3) runs in BLOCK_COMPONENTS lanes, joined at the end.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    largest = tl.full([BLOCK_COMPONENTS, BLOCK_ROWS], _FLOOR, tl.float32)
    total = tl.zeros([BLOCK_COMPONENTS, BLOCK_ROWS], tl.float32)
    for first in range(0, n_components, BLOCK_COMPONENTS):
        k = (first + tl.arange(0, BLOCK_COMPONENTS))[:, None]
        logit = tl.load(strip + k.to(tl.int64) * pitch + row[None, :], mask=k < n_components, other=float("-inf"))
        rise = logit - largest
        # One of the two terms is always 2⁰.
        fall = tl.exp2(-tl.abs(rise))
        total = tl.where(rise > 0, total * fall + 1.0, total + fall)
        largest = tl.maximum(largest, logit)
    peak = tl.max(largest, axis=0)
    log_total = tl.log2(tl.sum(total * tl.exp2(largest - peak[None, :]), axis=0))
    tl.store(peaks + row, peak)
    tl.store(log_totals + row, log_total)
    # Negated, so that NaN counts as far. Every program of a granule would store the same value.
    near = (tl.abs(peak + log_total) <= FAR) | (row >= n_rows)
    tl.store(flags + first_row // GRANULE, 1, mask=tl.max(tl.where(near, 0, 1), axis=0) > 0)


@triton.jit(do_not_specialize=["n_rows"])
def sum_rows(
    peaks, log_totals, weights, log_likelihoods, totals, n_rows,
    GRANULE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Each granule's Σ w log p(x) in nats and Σ w, (granules,) fp64, in an order that N does not change.

    ``weights`` (n,) fp64, of length one and unread without WEIGHTED.
    """
    granule = tl.program_id(0)
    log_likelihood = tl.zeros([BLOCK_ROWS], tl.float64)
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for first in range(0, GRANULE, BLOCK_ROWS):
        row = granule * GRANULE + first + tl.arange(0, BLOCK_ROWS)
        live = row < n_rows
        weight = tl.load(weights + row, mask=live, other=0.0) if WEIGHTED else tl.where(live, 1.0, 0.0).to(tl.float64)
        lse = tl.load(peaks + row, mask=live, other=0.0).to(tl.float64)
        lse += tl.load(log_totals + row, mask=live, other=0.0).to(tl.float64)
        log_likelihood += weight * lse
        total += weight
    tl.store(log_likelihoods + granule, tl.sum(log_likelihood, axis=0) * _NATS)
    tl.store(totals + granule, tl.sum(total, axis=0))


@triton.jit
def responsibility(share, peaks, log_totals, log_weights, row, place, live, threshold, WEIGHTED: tl.constexpr):
    """log₂ of r times its row's weight, −inf where r is dropped."""
    bits = tl.load(share + place, mask=live, other=float("-inf")) - tl.load(peaks + row, mask=live, other=0.0)
    bits -= tl.load(log_totals + row, mask=live, other=0.0)
    kept = tl.where(bits > threshold, bits, float("-inf"))
    return kept + tl.load(log_weights + row, mask=live, other=0.0) if WEIGHTED else kept


@triton.jit(do_not_specialize=["n_rows", "threshold"])
def list_live_rows(
    strip, peaks, log_totals, log_weights, lengths, units, counts, pitch, n_rows, threshold,
    GRANULE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Replace each component's logits in a granule by the list of its live rows, in the order of the rows.

    Grid (K, granules). An entry holds 2^{−unit} r w as fp16 in its upper half and the row's place in the granule in
    its lower half. ``lengths`` int32, ``units`` fp32 and ``counts`` Σ r w fp32 are (granules, K). ``threshold`` is the
    least log₂ r that is kept, ``log_weights`` (n,) fp32 log₂ w.
    """
    k = tl.program_id(0)
    start = tl.program_id(1) * GRANULE
    share = strip + k.to(tl.int64) * pitch + start
    steps = tl.minimum(GRANULE, n_rows - start)
    lane = tl.arange(0, BLOCK_ROWS)

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for first in range(0, steps, BLOCK_ROWS):
        place = first + lane
        live = place < steps
        bits = responsibility(share, peaks, log_totals, log_weights, start + place, place, live, threshold, WEIGHTED)
        top = tl.maximum(top, bits)
    largest = tl.max(top, axis=0)
    unit = tl.floor(largest) - _TOP_EXPONENT
    length = 0
    count = tl.zeros([BLOCK_ROWS], tl.float32)
    # An entry never lies behind the logit it stands for, and every logit that it overwrites was read before its sum.
    for first in range(0, tl.where(largest > float("-inf"), steps, 0), BLOCK_ROWS):
        place = first + lane
        live = place < steps
        bits = responsibility(share, peaks, log_totals, log_weights, start + place, place, live, threshold, WEIGHTED)
        kept = bits > float("-inf")
        resp = tl.exp2(bits - unit)
        count += resp
        half = resp.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        entry = ((half << 16) | place).to(tl.float32, bitcast=True)
        one = tl.where(kept, 1, 0)
        tl.store(share + length + tl.cumsum(one, axis=0) - 1, entry, mask=kept)
        length += tl.sum(one, axis=0)
    place = tl.program_id(1) * tl.num_programs(0) + k
    tl.store(lengths + place, length)
    tl.store(units + place, unit)
    tl.store(counts + place, tl.where(length > 0, tl.sum(count, axis=0) * tl.exp2(unit), 0.0))


@triton.jit(do_not_specialize=["n_components", "first_component", "first_granule"])
def accumulate(
    x, strip, lengths, units, centres, sums, scatter, pitch, n_components, first_component, first_granule,
    STRIDE: tl.constexpr, SIDE: tl.constexpr, GRANULE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Σ r d and Σ r ddᵀ, d = x' − c, of a granule's live rows: a program owns one block of one component's triangle.

    Grid (K'' · blocks, granules) for K'' components from ``first_component``. ``centres`` (K', STRIDE) fp16; ``sums``
    (granules, K'', STRIDE) and ``scatter`` (granules, K'', blocks, SIDE, SIDE) fp32, left alone where nothing lives.
    """
    N_BLOCKS: tl.constexpr = STRIDE // SIDE
    TRIANGLE: tl.constexpr = N_BLOCKS * (N_BLOCKS + 1) // 2
    block = tl.program_id(0) % TRIANGLE
    own = tl.program_id(0) // TRIANGLE
    k = first_component + own
    granule = tl.program_id(1)
    length = tl.load(lengths + granule * n_components + k)
    if length == 0:
        return
    j = 0
    for edge in tl.static_range(1, N_BLOCKS):
        j += tl.where(block >= edge * (edge + 1) // 2, 1, 0)
    i = block - j * (j + 1) // 2

    start = (first_granule + granule) * GRANULE
    share = strip + k.to(tl.int64) * pitch + start
    x += start.to(tl.int64) * STRIDE
    side = tl.arange(0, SIDE)
    lane = tl.arange(0, BLOCK_ROWS)
    left_centre = tl.load(centres + k * STRIDE + i * SIDE + side)[None, :]
    right_centre = tl.load(centres + k * STRIDE + j * SIDE + side)[None, :]
    total = tl.zeros([_LANES, SIDE], tl.float32)
    product = tl.zeros([SIDE, SIDE], tl.float32)
    for first in range(0, length, BLOCK_ROWS):
        # Past the end of the list r is zero, and the row is any.
        entry = tl.load(share + first + lane, mask=first + lane < length, other=0.0).to(tl.int32, bitcast=True)
        # In this unit r times |x' − c| < 2⁹ fits fp16; what it rounds is below 2⁻²⁰ of the list's largest r.
        resp = (entry >> 16).to(tl.int16).to(tl.float16, bitcast=True)[:, None] * _PRODUCT_UNIT
        rows = x + (entry & 0xFFFF)[:, None] * STRIDE + side[None, :]
        right = tl.load(rows + j * SIDE) - right_centre
        left = right if N_BLOCKS == 1 else tl.load(rows + i * SIDE) - left_centre
        weighted = resp * left
        # Rows that one thread holds are added first, without a word to the others.
        total += tl.sum(tl.reshape(weighted.to(tl.float32), [BLOCK_ROWS // _LANES, _LANES, SIDE]), axis=0)
        product = tl.dot(tl.trans(weighted), right, product)
    scale = tl.exp2(tl.load(units + granule * n_components + k) + _PRODUCT_EXPONENT)
    place = granule.to(tl.int64) * (tl.num_programs(0) // TRIANGLE) + own
    cell = (place * TRIANGLE + block) * SIDE * SIDE + side[:, None] * SIDE + side[None, :]
    tl.store(scatter + cell, product * scale)
    if i == j:
        tl.store(sums + place * STRIDE + i * SIDE + side, tl.sum(total, axis=0) * scale)


@triton.jit(do_not_specialize=["n_components", "first_component", "n_granules"])
def add_granules(
    counts, sums, scatter, log_likelihood, n_rows, lengths, counts_in, sums_in, scatter_in, log_likelihoods, totals,
    centres, n_components, first_component, n_granules,
    D: tl.constexpr, STRIDE: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add granules, one after the other, to the fp64 statistics, moved from c to the frame's origin.

    Σ r xxᵀ = Σ r ddᵀ + c sᵀ + s cᵀ + n ccᵀ with s = Σ r d. Grid (K'', STRIDE / BLOCK): a program owns BLOCK rows of
    one component's triangle. ``counts`` (K,), ``sums`` (K, D), ``scatter`` (K, D(D+1)/2) fp64; ``counts_in`` as
    `list_live_rows` leaves it, ``sums_in`` and ``scatter_in`` as `accumulate` does, ``log_likelihoods`` and ``totals``
    as `sum_rows`: one program adds them to ``log_likelihood`` and ``n_rows``, one fp64 each.
    """
    N_BLOCKS: tl.constexpr = STRIDE // SIDE
    TRIANGLE: tl.constexpr = N_BLOCKS * (N_BLOCKS + 1) // 2
    own = tl.program_id(0)
    k = first_component + own
    if (k == 0) & (tl.program_id(1) == 0):
        acc_likelihood = tl.load(log_likelihood)
        acc_rows = tl.load(n_rows)
        for granule in range(n_granules):
            acc_likelihood += tl.load(log_likelihoods + granule)
            acc_rows += tl.load(totals + granule)
        tl.store(log_likelihood, acc_likelihood)
        tl.store(n_rows, acc_rows)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, STRIDE)
    own_centre = tl.load(centres + k * STRIDE + i).to(tl.float64)
    left_centre = own_centre[:, None]
    right_centre = tl.load(centres + k * STRIDE + j).to(tl.float64)[None, :]
    block = j // SIDE * (j // SIDE + 1) // 2
    cell = (block[None, :] + (i // SIDE)[:, None]) * SIDE * SIDE + (i % SIDE)[:, None] * SIDE + (j % SIDE)[None, :]
    upper = (i[:, None] <= j[None, :]) & (j < D)[None, :]
    target = scatter + k.to(tl.int64) * (D * (D + 1) // 2) + (i * D - i * (i + 1) // 2)[:, None] + j[None, :]
    acc = tl.load(target, mask=upper, other=0.0)
    sums += k.to(tl.int64) * D + i
    acc_sums = tl.load(sums, mask=i < D, other=0.0)
    acc_count = tl.load(counts + k, mask=tl.program_id(1) == 0, other=0.0)
    place = own.to(tl.int64)
    for _ in range(n_granules):
        # Nothing was written where nothing lives.
        if tl.load(lengths + k) > 0:
            count = tl.load(counts_in + k).to(tl.float64)
            own_sum = tl.load(sums_in + place * STRIDE + i).to(tl.float64)
            right_sum = tl.load(sums_in + place * STRIDE + j).to(tl.float64)[None, :]
            part = tl.load(scatter_in + place * (TRIANGLE * SIDE * SIDE) + cell, mask=upper, other=0.0).to(tl.float64)
            moved = left_centre * right_sum + (own_sum + count * own_centre)[:, None] * right_centre
            acc += part + moved
            acc_sums += own_sum + count * own_centre
            acc_count += count
        place += tl.num_programs(0)
        lengths += n_components
        counts_in += n_components
    tl.store(target, acc, mask=upper)
    tl.store(sums, acc_sums, mask=i < D)
    tl.store(counts + k, acc_count, mask=tl.program_id(1) == 0)


@triton.jit(do_not_specialize=["n_components", "n_rows", "rank", "width"])
def next_best(
    strip, peaks, log_totals, logits, labels, resp, pitch, n_components, n_rows, rank, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    """The component of each row that comes after the last one found: greatest logit first, ties to the lower index.

    ``logits`` fp32 and the last label (pitch,) are replaced; ``labels`` int32 and ``resp`` fp32 (n, width) get column
    ``rank``. Before the first round ``logits`` holds +inf.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < n_rows
    place = row.to(tl.int64) * width + rank
    last = tl.load(logits + row)
    last_label = tl.load(labels + place - 1, mask=live & (rank > 0), other=-1)
    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    label = tl.full([BLOCK_ROWS], _NO_COMPONENT, tl.int32)
    for first in range(0, n_components, BLOCK_COMPONENTS):
        k = (first + tl.arange(0, BLOCK_COMPONENTS))[:, None]
        inside = k < n_components
        logit = tl.load(strip + k.to(tl.int64) * pitch + row[None, :], mask=inside, other=float("-inf"))
        after = (logit < last[None, :]) | ((logit == last[None, :]) & (k > last_label[None, :]))
        logit = tl.where(inside & after, logit, float("-inf"))
        peak = tl.max(logit, axis=0)
        candidate = tl.min(tl.where(inside & after & (logit == peak[None, :]), k, _NO_COMPONENT), axis=0)
        better = (peak > best) | ((peak == best) & (candidate < label))
        best = tl.where(better, peak, best)
        label = tl.where(better, candidate, label)
    tl.store(logits + row, best)
    tl.store(labels + place, label, mask=live)
    normaliser = tl.load(peaks + row)
    tl.store(resp + place, tl.exp2((best - normaliser) - tl.load(log_totals + row)), mask=live)
