"""The fused E-step on GPUs for ``full``: logits a strip of rows at a time, then sums over what is live.

`full` has the equations. A strip is a whole number of granules; each granule's fp32 sums are stored apart and joined in
fp64 in row order. Every bound, logit, list and sum follows from a granule's own rows, so that bits never depend on how
rows were cut into calls or strips: the only atomics are maxima and sums of integers, the same in any order. All strips
of a call share one set of buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, log2
from typing import TypeVar

import torch
import triton
from torch import Tensor

from streamgmm.arriving import Arriving
from streamgmm.device import on
from streamgmm.frame import Frame
from streamgmm.kernels import Problem, TopComponents
from streamgmm.kernels.fused import full as device_code
from streamgmm.kernels.fused.configs import architecture_of, stride_of
from streamgmm.kernels.fused.full_parameters import (
    WIDEST,
    FullParameters,
    check_features,
    n_blocks,
    padded_components,
    parameter_bytes,
    screens,
    side_of,
)
from streamgmm.kernels.fused.rows import convert_rows
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

_STRIP_BYTES = 128 << 20
_ROW_BYTES = 16 << 20
# K = 1024, D = 128 at once.
_PARTIAL_BYTES = 65 << 20
_ROW_PADDING = 256
# Centred rows and their differences from a component's centre stay within fp16 times a responsibility.
_LARGEST_ROW = 255.0
# Where |lse| is larger, rounding the logits to fp32 moves responsibilities by more than a per cent. The density of
# many features is far from one without any row being far, hence the allowance added for D.
_FAR_BITS = 2**17
# Components that one program sees: few, so that programs at work at once share the factors in L2.
_GROUP = 64
# Where more of a granule's pairs survive their bounds, gathering rows costs more than completing every pair.
_DENSE_ABOVE = 0.4
# A list of survivors holds at most this part of a granule; beyond, a component completes all of its rows.
_LISTED_PART = 4
_NATS = 0.6931471805599453

T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """What one program holds at once, and how it is run; ``width`` is components, or features of a block of sums."""

    rows: int
    width: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FullLaunches:
    """Tiles of the launches that multiply matrices: ``screen`` is `log_joint` of the first block alone."""

    log_joint: Tile
    screen: Tile
    complete: Tile
    accumulate: Tile


# By the stride of a row. Components side by side make the 64 or 128 columns of one product of `log_joint`.
_LAUNCHES: dict[str, dict[int, FullLaunches]] = {
    "hopper": {
        16: FullLaunches(Tile(128, 8, 8, 3), Tile(128, 8, 8, 3), Tile(64, 1, 4, 2), Tile(64, 16, 4, 3)),
        32: FullLaunches(Tile(128, 4, 8, 3), Tile(128, 4, 8, 3), Tile(64, 1, 4, 2), Tile(64, 32, 4, 3)),
        64: FullLaunches(Tile(128, 2, 8, 3), Tile(128, 2, 8, 3), Tile(64, 1, 4, 2), Tile(64, 64, 4, 3)),
        # 256 rows halve what is read of the factors; a third stage hides the gathering of rows.
        128: FullLaunches(Tile(256, 1, 8, 3), Tile(256, 1, 8, 3), Tile(64, 1, 4, 2), Tile(32, 128, 4, 3)),
        256: FullLaunches(Tile(128, 1, 8, 2), Tile(256, 1, 8, 3), Tile(64, 1, 4, 2), Tile(32, 128, 8, 2)),
    },
    "any": {
        16: FullLaunches(Tile(64, 4, 4, 2), Tile(64, 4, 4, 2), Tile(32, 1, 4, 2), Tile(32, 16, 4, 2)),
        32: FullLaunches(Tile(64, 2, 4, 2), Tile(64, 2, 4, 2), Tile(32, 1, 4, 2), Tile(32, 32, 4, 2)),
        64: FullLaunches(Tile(64, 1, 4, 2), Tile(64, 1, 4, 2), Tile(32, 1, 4, 2), Tile(32, 64, 4, 2)),
        128: FullLaunches(Tile(64, 1, 4, 2), Tile(64, 1, 4, 2), Tile(32, 1, 4, 2), Tile(32, 64, 4, 2)),
        256: FullLaunches(Tile(64, 1, 4, 1), Tile(64, 1, 4, 2), Tile(32, 1, 4, 1), Tile(32, 64, 4, 2)),
    },
}


def full_launches_of(problem: Problem, architecture: str) -> FullLaunches:
    """Tiles for a problem: never by N or by timing."""
    return _LAUNCHES[architecture][stride_of(problem.n_features)]


def full_granule_of(problem: Problem) -> int:
    """Rows of one fp32 accumulation: enough that storing K·D² partial sums stays cheap, and no more than a strip."""
    wished = min(max(1 << (32 * problem.n_components - 1).bit_length(), 1024), 32768)
    strip = _STRIP_BYTES // (4 * padded_components(problem.n_components))
    return max(min(wished, 1 << max(strip, 1).bit_length() - 1), _ROW_PADDING)


def live_margin(problem: Problem) -> float:
    """Bits below log p(x) from which on a component is dropped: all of them together hold 2⁻²⁴ of the row."""
    return 24.0 + log2(problem.n_components)


@dataclass(frozen=True)
class Buffers:
    """Device memory of one strip of up to n' rows, a whole number of granules; used by one strip after the other.

    Attributes
    ----------
    x, ordered : (n', D') fp16 tensors
        x', zero in the padding, and the same in the factors' order of features; one tensor where that is the data's.
    logits : (K' · n',) fp32 tensor
        (K', pitch) log joint densities in bits; then, of each granule, lists of live rows.
    peaks, log_totals : (n',) fp32 tensors
        Their sum is lse in bits.
    lists, survivors : (granules, K, capacity) int16, (granules, K) int32 tensors
        Rows whose bound matters, and how many there are; of length one without screening.
    """

    x: Tensor
    ordered: Tensor
    logits: Tensor
    peaks: Tensor
    log_totals: Tensor
    lists: Tensor
    survivors: Tensor


@dataclass(frozen=True)
class Sums:
    """fp32 partial sums and fp64 likelihoods of a strip's granules; ``sums`` and ``scatter`` of some components."""

    lengths: Tensor
    units: Tensor
    counts: Tensor
    sums: Tensor
    scatter: Tensor
    log_likelihoods: Tensor
    totals: Tensor


@dataclass(frozen=True)
class Strip:
    """Some granules of rows, in the buffers; ``flags`` (granules,) int32 on the device: 1 where fp64 must take over."""

    first: int
    rows: Tensor
    buffers: Buffers
    flags: Tensor

    @property
    def pitch(self) -> int:
        return -(-len(self.rows) // _ROW_PADDING) * _ROW_PADDING


def _runs(arriving: Arriving) -> Iterator[tuple[int, int, bool]]:
    """Half-open runs of granules in order, and whether their flags say that each is to be taken in fp64, by itself."""
    (host,) = arriving.wait()
    first, flags = 0, host.tolist()
    for i, flag in enumerate(flags):
        if flag:
            if first < i:
                yield first, i, False
            yield i, i + 1, True
            first = i + 1
    if first < len(flags):
        yield first, len(flags), False


@dataclass(frozen=True)
class FullKernel:
    """`Kernel` on a CUDA device for ``full`` at ``medium``: fp16 products, fp32 sums."""

    @property
    def precision(self) -> str:
        return "medium"

    def granule(self, problem: Problem) -> int:
        return full_granule_of(problem)

    def scratch_bytes(self, problem: Problem, rows: int, workers: int, top: int = 0) -> int:
        check_features(problem)
        granule, stride = self.granule(problem), stride_of(problem.n_features)
        span = min(_span(problem), -(-rows // granule) * granule)
        granules = span // granule
        screened = screens(problem)
        strip = span * (4 * padded_components(problem.n_components) + (4 if screened else 2) * stride + 32)
        if screened:
            strip += problem.n_components * (2 * span // _LISTED_PART + 4 * granules)
        own = max(bytes_of_component(problem, launches.accumulate.width) for launches in _launches_anywhere(problem))
        partials = min(granules * problem.n_components * own, max(_PARTIAL_BYTES, granules * own))
        lists = 12 * granules * problem.n_components
        # Weights in fp64 and their logarithms, flags and likelihoods.
        by_rows = 28 * rows + 256 * (rows // span + 1)
        widest = WIDEST.scratch_bytes(problem, granule, 1)
        return strip + partials + lists + by_rows + widest + parameter_bytes(problem)

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> FullParameters:
        parameters = FullParameters(mixture, frame, device)
        check_features(parameters.problem)
        return parameters

    def accumulate(
        self, rows: Tensor, parameters: FullParameters, statistics: Statistics, weights: Tensor | None = None
    ) -> None:
        problem = parameters.problem
        wide = None if weights is None else weights.double()
        log_weights = None if wide is None else wide.log2().float()
        with on(rows.device):
            sums = _empty_sums(problem, len(rows), rows.device)
            for strip in _strips(rows, parameters, screens(problem)):
                flags = Arriving.sent(strip.flags)
                place = slice(strip.first, strip.first + len(strip.rows))
                own = None if wide is None or log_weights is None else (wide[place], log_weights[place])
                _accumulate(strip, own, parameters, sums, flags, statistics)

    def finish(self, statistics: Statistics, parameters: FullParameters) -> Statistics:
        return statistics

    def log_likelihood(self, rows: Tensor, parameters: FullParameters) -> Tensor:
        return torch.cat(
            _map_strips(lambda strip: _log_likelihood(strip, parameters), rows, parameters, screens(parameters.problem))
        )

    def top(self, rows: Tensor, parameters: FullParameters, m: int) -> TopComponents:
        # The m-th component may be one that a bound rules out.
        parts = _map_strips(lambda strip: _top(strip, parameters, m), rows, parameters, screened=False)
        return TopComponents(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def bytes_of_component(problem: Problem, side: int) -> int:
    """One component's partial sums of one granule, in blocks of ``side`` features."""
    stride = stride_of(problem.n_features)
    return 4 * (n_blocks(stride, side) * side**2 + stride)


def _launches_anywhere(problem: Problem) -> list[FullLaunches]:
    return [full_launches_of(problem, architecture) for architecture in _LAUNCHES]


def _span(problem: Problem) -> int:
    """Rows of a strip: whole granules within the limits on scratch, at least one."""
    granule = full_granule_of(problem)
    by_logits = _STRIP_BYTES // (4 * padded_components(problem.n_components) * granule)
    by_rows = _ROW_BYTES // (2 * stride_of(problem.n_features) * granule)
    return granule * max(1, min(by_logits, by_rows))


def _map_strips(function: Callable[[Strip], T], rows: Tensor, parameters: FullParameters, screened: bool) -> list[T]:
    with on(rows.device):
        return [function(strip) for strip in _strips(rows, parameters, screened)]


def _strips(rows: Tensor, parameters: FullParameters, screened: bool) -> Iterator[Strip]:
    """Strips in order, each with its logits and their log-sum-exp; the buffers are the next one's when it is asked for.

    Without ``screened`` every logit is whole.
    """
    problem, granule, device = parameters.problem, full_granule_of(parameters.problem), rows.device
    span = min(_span(problem), -(-len(rows) // granule) * granule)
    granules, starts = span // granule, range(0, len(rows), span)
    buffers = _empty_buffers(problem, span, screened, device)
    # A strip's numbers begin at 64 bytes, so that the kernels see one alignment.
    zeros = torch.zeros((len(starts), 3, -(-granules // 16) * 16), dtype=torch.int32, device=device)
    for first, (flags, candidates, survivors) in zip(starts, zeros, strict=True):
        own = rows[first : first + span]
        strip = Strip(first, own, buffers, flags[: -(-len(own) // granule)])
        _convert(strip, parameters)
        if screened:
            _screen(strip, parameters, candidates, survivors)
        else:
            _log_joint(strip, parameters, 0, None, survivors)
        device_code.normalise[(strip.pitch // 32,)](
            buffers.logits, buffers.peaks, buffers.log_totals, flags, strip.pitch, len(own),
            padded_components(problem.n_components), FAR=_FAR_BITS + 64 * problem.n_features, GRANULE=granule,
            BLOCK_ROWS=32, BLOCK_COMPONENTS=64, num_warps=4,
        )  # fmt: skip
        yield strip


def _empty_buffers(problem: Problem, span: int, screened: bool, device: torch.device) -> Buffers:
    granule, k, stride = full_granule_of(problem), problem.n_components, stride_of(problem.n_features)
    granules = span // granule
    x = torch.empty((span, stride), dtype=torch.float16, device=device)
    listed = (granules, k, granule // _LISTED_PART) if screened else (1, 1, 1)
    return Buffers(
        x=x,
        ordered=torch.empty_like(x) if screens(problem) else x,
        logits=torch.empty(padded_components(k) * span, dtype=torch.float32, device=device),
        peaks=torch.empty(span, dtype=torch.float32, device=device),
        log_totals=torch.empty(span, dtype=torch.float32, device=device),
        lists=torch.empty(listed, dtype=torch.int16, device=device),
        survivors=torch.empty(listed[:2], dtype=torch.int32, device=device),
    )


def _convert(strip: Strip, parameters: FullParameters) -> None:
    """Rows in working form, and in the factors' order; both maxima of `_screen` begin at −∞."""
    problem, buffers, rows = parameters.problem, strip.buffers, strip.rows
    stride = stride_of(problem.n_features)
    shift, scale = parameters.origins[torch.float64 if rows.dtype == torch.float64 else torch.float32]
    # The norms that conversion also gives have no use here; they are overwritten.
    convert_rows[(strip.pitch // 32,)](
        rows.contiguous(), shift, scale, buffers.x, buffers.peaks, strip.flags, len(rows),
        D=problem.n_features, STRIDE=stride, GRANULE=full_granule_of(problem), LIMIT=_LARGEST_ROW, DIAG=False,
        BLOCK_ROWS=32, BLOCK_FEATURES=min(stride, 128), num_warps=4,
    )  # fmt: skip
    if screens(problem):
        device_code.order_features[(strip.pitch // 32,)](
            buffers.x, parameters.factors.order, buffers.ordered, buffers.peaks, buffers.log_totals,
            STRIDE=stride, BLOCK_ROWS=32, num_warps=4,
        )  # fmt: skip


def _log_joint(strip: Strip, parameters: FullParameters, first: int, last: int | None, survivors: Tensor) -> None:
    """Block columns ``first`` to ``last`` (none: all) of the logits."""
    problem, factors, buffers = parameters.problem, parameters.factors, strip.buffers
    stride, side, granule = stride_of(problem.n_features), side_of(problem), full_granule_of(problem)
    launches = full_launches_of(problem, architecture_of(strip.rows.device))
    tile = launches.log_joint if last is None else launches.screen
    n_components = padded_components(problem.n_components)
    device_code.log_joint[(strip.pitch // tile.rows, triton.cdiv(n_components, _GROUP))](
        buffers.ordered, factors.blocks, factors.offsets, factors.squares, factors.constants, buffers.logits,
        buffers.peaks, survivors, strip.pitch, n_components, _GROUP, _dense_above(problem),
        STRIDE=stride, SIDE=side, FIRST=first, LAST=last or stride // side, GRANULE=granule,
        BLOCK_ROWS=tile.rows, BLOCK_COMPONENTS=tile.width, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _screen(strip: Strip, parameters: FullParameters, candidates: Tensor, survivors: Tensor) -> None:
    """Logits of the pairs that matter, bounds of the others; two (granules,) int32 zeros become numbers of pairs."""
    problem, factors, buffers, n = parameters.problem, parameters.factors, strip.buffers, len(strip.rows)
    stride, granule, pitch = stride_of(problem.n_features), full_granule_of(problem), strip.pitch
    tile = full_launches_of(problem, architecture_of(strip.rows.device)).complete
    # log_totals, not known yet, holds the largest logit that each row is known to have.
    lower, pairs = buffers.log_totals, (problem.n_components, triton.cdiv(n, granule))
    _log_joint(strip, parameters, 0, 1, survivors)
    for reference, references, margin, total in (
        (True, buffers.peaks, 0.0, candidates),
        (False, lower, live_margin(problem), survivors),
    ):
        device_code.list_survivors[pairs](
            buffers.logits, references, buffers.lists, buffers.survivors, total, pitch, n, margin,
            GRANULE=granule, CAPACITY=granule // _LISTED_PART, BLOCK_ROWS=min(granule, 2048), num_warps=4,
        )  # fmt: skip
        device_code.complete[pairs](
            buffers.ordered, factors.blocks, factors.offsets, factors.squares, buffers.logits, buffers.lists,
            buffers.survivors, total, lower, pitch, n, _dense_above(problem),
            STRIDE=stride, SIDE=side_of(problem), FIRST=1, GRANULE=granule, CAPACITY=granule // _LISTED_PART,
            REFERENCE=reference, BLOCK_ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    _log_joint(strip, parameters, 1, None, survivors)


def _dense_above(problem: Problem) -> int:
    """Surviving pairs of a granule beyond which all are completed."""
    return int(_DENSE_ABOVE * problem.n_components * full_granule_of(problem))


def _components_at_once(problem: Problem, granules: int, side: int) -> int:
    return min(problem.n_components, max(1, _PARTIAL_BYTES // (granules * bytes_of_component(problem, side))))


def _empty_sums(problem: Problem, rows: int, device: torch.device) -> Sums:
    k, stride, granule = problem.n_components, stride_of(problem.n_features), full_granule_of(problem)
    granules = min(_span(problem) // granule, -(-rows // granule))
    side = full_launches_of(problem, architecture_of(device)).accumulate.width
    own = _components_at_once(problem, granules, side)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Sums(
        lengths=empty(granules, k, dtype=torch.int32),
        units=empty(granules, k),
        counts=empty(granules, k),
        sums=empty(granules * own * stride),
        scatter=empty(granules * own * n_blocks(stride, side) * side**2),
        log_likelihoods=empty(granules, dtype=torch.float64),
        totals=empty(granules, dtype=torch.float64),
    )


def _accumulate(
    strip: Strip,
    weights: tuple[Tensor, Tensor] | None,
    parameters: FullParameters,
    sums: Sums,
    flags: Arriving,
    statistics: Statistics,
) -> None:
    """Add a strip; ``weights`` and their logarithms, (n,) fp64 and fp32.

    What does not depend on the flags is under way before they are waited for, so that the device never is.
    """
    problem, buffers, n = parameters.problem, strip.buffers, len(strip.rows)
    granule, k = full_granule_of(problem), problem.n_components
    granules = -(-n // granule)
    weighted = weights is not None
    # Without weights the kernels do not read what stands in for them.
    wide, log_weights = weights or (sums.totals, buffers.peaks)
    device_code.sum_rows[(granules,)](
        buffers.peaks, buffers.log_totals, wide, sums.log_likelihoods, sums.totals, n,
        GRANULE=granule, WEIGHTED=weighted, BLOCK_ROWS=1024 if granule > 1024 else granule,
    )  # fmt: skip
    device_code.list_live_rows[(k, granules)](
        buffers.logits, buffers.peaks, buffers.log_totals, log_weights, sums.lengths, sums.units, sums.counts,
        strip.pitch, n, -live_margin(problem),
        GRANULE=granule, WEIGHTED=weighted, BLOCK_ROWS=min(granule, 2048), num_warps=4,
    )  # fmt: skip
    side = full_launches_of(problem, architecture_of(strip.rows.device)).accumulate.width
    most = _components_at_once(problem, len(sums.lengths), side)
    at_once = most == k
    if at_once:
        _sum_granules(strip, parameters, sums, 0, granules, 0, k)
    for begin, end, far in _runs(flags):
        if far:
            place = slice(begin * granule, end * granule)
            share = () if weights is None else (wide[place],)
            WIDEST.accumulate(strip.rows[place], parameters.double, statistics, *share)
            continue
        for first in range(0, k, most):
            own = min(most, k - first)
            if not at_once:
                _sum_granules(strip, parameters, sums, begin, end, first, own)
            _add_granules(parameters, sums, begin, end, first, own, begin if at_once else 0, statistics)


def _sum_granules(
    strip: Strip, parameters: FullParameters, sums: Sums, begin: int, end: int, first: int, own: int
) -> None:
    """``sums.sums`` and ``sums.scatter`` of granules ``begin`` to ``end``, ``own`` components from ``first``."""
    problem, device = parameters.problem, strip.rows.device
    tile, stride = full_launches_of(problem, architecture_of(device)).accumulate, stride_of(problem.n_features)
    device_code.accumulate[(own * n_blocks(stride, tile.width), end - begin)](
        strip.buffers.x, strip.buffers.logits, sums.lengths[begin:], sums.units[begin:], parameters.factors.centres,
        sums.sums, sums.scatter, strip.pitch, problem.n_components, first, begin,
        STRIDE=stride, SIDE=tile.width, GRANULE=full_granule_of(problem), BLOCK_ROWS=tile.rows,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _add_granules(
    parameters: FullParameters, sums: Sums, begin: int, end: int, first: int, own: int, skipped: int,
    statistics: Statistics,
) -> None:  # fmt: skip
    """Granules ``begin`` to ``end``, whose partial sums lie behind those of ``skipped`` others."""
    problem, factors = parameters.problem, parameters.factors
    stride = stride_of(problem.n_features)
    side = full_launches_of(problem, architecture_of(factors.blocks.device)).accumulate.width
    block = min(stride, 2048 // stride)
    device_code.add_granules[(own, stride // block)](
        statistics.counts, statistics.sums, statistics.scatter, statistics.log_likelihood, statistics.n_rows,
        sums.lengths[begin:], sums.counts[begin:], sums.sums[skipped * own * stride :],
        sums.scatter[skipped * own * n_blocks(stride, side) * side**2 :], sums.log_likelihoods[begin:],
        sums.totals[begin:], factors.centres, problem.n_components, first, end - begin,
        D=problem.n_features, STRIDE=stride, SIDE=side, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _log_likelihood(strip: Strip, parameters: FullParameters) -> Tensor:
    """(n,) fp64, nats."""
    granule, n, flags = full_granule_of(parameters.problem), len(strip.rows), Arriving.sent(strip.flags)
    values = (strip.buffers.peaks[:n].double() + strip.buffers.log_totals[:n].double()) * _NATS
    for begin, end, far in _runs(flags):
        if far:
            place = slice(begin * granule, end * granule)
            values[place] = WIDEST.log_likelihood(strip.rows[place], parameters.double)
    return values


def _top(strip: Strip, parameters: FullParameters, m: int) -> TopComponents:
    buffers, n, pitch, granule = strip.buffers, len(strip.rows), strip.pitch, full_granule_of(parameters.problem)
    flags, device = Arriving.sent(strip.flags), strip.rows.device
    found = TopComponents(
        (buffers.peaks[:n].double() + buffers.log_totals[:n].double()) * _NATS,
        torch.empty((n, m), dtype=torch.int32, device=device),
        torch.empty((n, m), dtype=torch.float32, device=device),
    )
    last = torch.full((pitch,), inf, dtype=torch.float32, device=device)
    for rank in range(m):
        device_code.next_best[(pitch // 32,)](
            buffers.logits, buffers.peaks, buffers.log_totals, last, found.labels, found.resp, pitch,
            parameters.problem.n_components, n, rank, m, BLOCK_ROWS=32, BLOCK_COMPONENTS=32, num_warps=4,
        )  # fmt: skip
    for begin, end, far in _runs(flags):
        if far:
            place = slice(begin * granule, end * granule)
            for field, exact in zip(found, WIDEST.top(strip.rows[place], parameters.double, m), strict=True):
                field[place] = exact
    return found
