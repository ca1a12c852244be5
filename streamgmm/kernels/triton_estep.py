"""The fused E-step on GPUs, for ``spherical`` and ``diag``: two launches, no N×K matrix, no atomics.

Rows are converted to x' a bounded number at a time; `triton_kernels` has the equations. Each granule's fp32 sums are
stored apart and joined in fp64 in row order, so that bits never depend on how rows were cut into calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem
from streamgmm.kernels import triton_kernels as device_code
from streamgmm.kernels.triton_configs import (
    COMPONENT_PADDING,
    ROW_PADDING,
    Launches,
    architecture_of,
    granule_of,
    launches_of,
    stride_of,
)
from streamgmm.kernels.triton_parameters import WIDEST, Coefficients, TritonParameters
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

_ROW_BYTES = 256 << 20
_PARTIAL_BYTES = 128 << 20
# Larger |x'| would overflow x'² in fp16.
_LARGEST_MEDIUM = 255.0
# Where |lse| is larger, rounding the logits to fp32 moves responsibilities by more than a per cent. The density of
# many features is far from one without any row being far, hence the allowance that `_normalised` adds for D.
_FAR_BITS = 2**17
_NATS = 0.6931471805599453


@dataclass(frozen=True)
class WorkingRows:
    """Some granules of rows in working form.

    Attributes
    ----------
    x : (n', D') fp16 or fp32 tensor
        x', zero in the padding.
    norms : (n',) fp32 tensor
        ‖x'‖² of the rounded x' for ``spherical``; of length one for ``diag``.
    lse : (n',) fp32 tensor
        log₂ Σ 2^l; +inf in the padding.
    n_rows : int
        Rows without the padding.
    """

    x: Tensor
    norms: Tensor
    lse: Tensor
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows


@dataclass(frozen=True)
class Partials:
    """One sum a granule, for a range of components: fp32 except ``log_likelihood``.

    Attributes
    ----------
    counts : (granules, K') tensor
    sums : (granules, K', D') tensor
    scatter : tensor
        As ``sums`` for ``diag``, as ``counts`` for ``spherical``.
    """

    counts: Tensor
    sums: Tensor
    scatter: Tensor

    def granules(self, first: int, last: int) -> Partials:
        return Partials(self.counts[first:last], self.sums[first:last], self.scatter[first:last])


@dataclass(frozen=True)
class TritonKernel:
    """`Kernel` on a CUDA device, ``medium`` in fp16 or ``high`` in three-term tf32."""

    precision: str

    def granule(self, problem: Problem) -> int:
        return granule_of(problem)

    def scratch_bytes(self, problem: Problem, rows: int, workers: int) -> int:
        granule = self.granule(problem)
        span, components = _bounds(problem, self._working_type)
        granules = -(-min(rows, span) // granule)
        partials = granules * components * _component_bytes(problem)
        # Granules beyond fp16's range are converted once more, to fp32.
        widths = (2, 4) if self.precision == "medium" else (4,)
        converted = sum(granules * granule * (width * stride_of(problem.n_features) + 8) for width in widths)
        return converted + partials + 16 * granules + WIDEST.scratch_bytes(problem, granule, 1)

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> TritonParameters:
        return TritonParameters(mixture, frame, device)

    def accumulate(self, rows: Tensor, parameters: TritonParameters, statistics: Statistics) -> None:
        problem = parameters.problem
        granule = self.granule(problem)
        span, width = _bounds(problem, self._working_type)
        with _on(rows.device):
            for piece in rows.split(span):
                working, redone = _normalised(piece, parameters, self._working_type)
                granules = -(-len(piece) // granule)
                log_likelihoods = torch.empty(granules, dtype=torch.float64, device=rows.device)
                device_code.sum_log_likelihood[(granules,)](
                    working.lse, log_likelihoods, len(piece), GRANULE=granule, BLOCK_ROWS=1024
                )
                _add(statistics.log_likelihood.view(1, 1), log_likelihoods.view(granules, 1, 1))
                n_padded = -(-problem.n_components // COMPONENT_PADDING) * COMPONENT_PADDING
                for first in range(0, n_padded, width):
                    partials = _empty_partials(problem, granules, min(width, n_padded - first), rows.device)
                    _accumulate(working, parameters, first, partials)
                    for start, again in redone:
                        stop = start + -(-len(again) // granule)
                        replaced = partials.granules(start, stop)
                        if isinstance(again, WorkingRows):
                            _accumulate(again, parameters, first, replaced)
                        else:
                            _accumulate_widest(again, parameters, granule, first, replaced)
                    own = slice(first, min(first + width, problem.n_components))
                    _add(statistics.counts[own, None], partials.counts[..., None])
                    _add(statistics.sums[own], partials.sums)
                    if problem.covariance_type == "diag":
                        _add(statistics.scatter[own], partials.scatter)
                    else:
                        _add(statistics.scatter[own, None], partials.scatter[..., None])
        statistics.n_rows.add_(len(rows))

    def log_likelihood(self, rows: Tensor, parameters: TritonParameters) -> Tensor:
        span, _ = _bounds(parameters.problem, self._working_type)
        with _on(rows.device):
            bits = [_normalised(x, parameters, self._working_type)[0].lse[: len(x)] for x in rows.split(span)]
        return torch.cat(bits).double().mul_(_NATS)

    @property
    def _working_type(self) -> torch.dtype:
        return torch.float16 if self.precision == "medium" else torch.float32


def _normalised(
    rows: Tensor, parameters: TritonParameters, working_type: torch.dtype
) -> tuple[WorkingRows, list[tuple[int, WorkingRows | Tensor]]]:
    """Rows with their log-sum-exp, and the runs of granules to be taken again in a wider type.

    fp16 hands on to fp32, and fp32 to fp64 (stored rows, for `WIDEST`): a granule's own rows decide, so neither cuts
    nor other rows change a bit. Each run comes with the number of its first granule, wider runs after narrower ones;
    its log-sum-exp has replaced the narrower one.
    """
    granule = granule_of(parameters.problem)
    working, flags = _convert(rows, parameters, working_type, granule)
    _log_sum_exp(working, parameters)
    device_code.flag_far_rows[(triton.cdiv(len(rows), 1024),)](
        working.lse, flags, len(rows),
        FAR=_FAR_BITS + 64 * parameters.problem.n_features, GRANULE=granule, BLOCK_ROWS=1024,
    )  # fmt: skip
    redone: list[tuple[int, WorkingRows | Tensor]] = []
    for first, last in _runs(flags.tolist()):
        begin, end = first * granule, min(last * granule, len(rows))
        if working_type == torch.float16:
            again, wider = _normalised(rows[begin:end], parameters, torch.float32)
            working.lse[begin:end] = again.lse[: end - begin]
            redone += [(first, again), *((first + start, run) for start, run in wider)]
        else:
            # One granule at a time: the bits of a product depend on its shape.
            exact = [WIDEST.log_likelihood(own, parameters.double) for own in rows[begin:end].split(granule)]
            working.lse[begin:end] = torch.cat(exact) / _NATS
            redone.append((first, rows[begin:end]))
    return working, redone


def _bounds(problem: Problem, working_type: torch.dtype) -> tuple[int, int]:
    """Rows converted at once, and components accumulated at once: what keeps scratch within its two limits."""
    granule = granule_of(problem)
    n_padded = -(-problem.n_components // COMPONENT_PADDING) * COMPONENT_PADDING
    component = _component_bytes(problem)
    components = min(
        n_padded, max(COMPONENT_PADDING, _PARTIAL_BYTES // component // COMPONENT_PADDING * COMPONENT_PADDING)
    )
    by_rows = _ROW_BYTES // (granule * (working_type.itemsize * stride_of(problem.n_features) + 8))
    by_partials = _PARTIAL_BYTES // (components * component)
    return granule * max(1, min(by_rows, by_partials)), components


def _component_bytes(problem: Problem) -> int:
    """Bytes of one component's partial."""
    planes = 2 if problem.covariance_type == "diag" else 1
    return 4 * (planes * stride_of(problem.n_features) + 2)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _runs(flags: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open runs of non-zero flags."""
    first = None
    for i, flag in enumerate([*flags, 0]):
        if flag and first is None:
            first = i
        elif not flag and first is not None:
            yield first, i
            first = None


def _convert(
    rows: Tensor, parameters: TritonParameters, working_type: torch.dtype, granule: int
) -> tuple[WorkingRows, Tensor]:
    """Working rows whose lse is still to be filled, and a flag a granule: set where fp16 cannot hold its squares."""
    n, d = rows.shape
    stride = stride_of(d)
    n_padded = -(-n // ROW_PADDING) * ROW_PADDING
    device = rows.device
    x = torch.empty((n_padded, stride), dtype=working_type, device=device)
    norms = torch.empty(1 if parameters.is_diag else n_padded, dtype=torch.float32, device=device)
    lse = torch.empty(n_padded, dtype=torch.float32, device=device)
    flags = torch.zeros(-(-n // granule), dtype=torch.int32, device=device)
    shift, scale = parameters.origins[torch.float64 if rows.dtype == torch.float64 else torch.float32]
    block = 32
    device_code.convert_rows[(n_padded // block,)](
        rows.contiguous(), shift, scale, x, norms, flags, n,
        D=d, STRIDE=stride, GRANULE=granule, LIMIT=_LARGEST_MEDIUM if working_type == torch.float16 else 0.0,
        DIAG=parameters.is_diag, BLOCK_ROWS=block, BLOCK_FEATURES=min(stride, 128), num_warps=4,
    )  # fmt: skip
    return WorkingRows(x, norms, lse, n), flags


def _launch(working: WorkingRows, parameters: TritonParameters) -> tuple[Launches, Coefficients, str]:
    """Tiles, coefficients and kind of product for a working type."""
    half = working.x.dtype == torch.float16
    launches = launches_of(parameters.problem, "medium" if half else "high", architecture_of(working.x.device))
    # The kind concerns fp32 operands; fp16 products are exact in fp32 anyway.
    return (launches, parameters.half, "ieee") if half else (launches, parameters.single, "tf32x3")


def _log_sum_exp(working: WorkingRows, parameters: TritonParameters) -> None:
    launches, theta, product = _launch(working, parameters)
    tile = launches.log_sum_exp
    n_padded, stride = working.x.shape
    device_code.log_sum_exp[(n_padded // tile.rows,)](
        working.x, working.norms, theta.linear, theta.quadratic, theta.exponents, theta.constants, working.lse,
        working.n_rows, len(theta.constants) // tile.components,
        STRIDE=stride, STEP=launches.step, DIAG=parameters.is_diag, PRECISION=product,
        BLOCK_ROWS=tile.rows, BLOCK_COMPONENTS=tile.components, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _empty_partials(problem: Problem, granules: int, components: int, device: torch.device) -> Partials:
    counts = torch.empty((granules, components), dtype=torch.float32, device=device)
    sums = torch.empty((granules, components, stride_of(problem.n_features)), dtype=torch.float32, device=device)
    return Partials(counts, sums, torch.empty_like(sums if problem.covariance_type == "diag" else counts))


def _accumulate(working: WorkingRows, parameters: TritonParameters, first: int, partials: Partials) -> None:
    launches, theta, product = _launch(working, parameters)
    tile = launches.accumulate
    n_padded, stride = working.x.shape
    granules, components = partials.counts.shape
    slices = stride // launches.slice
    device_code.accumulate[(components // tile.components * slices, granules)](
        working.x, working.norms, working.lse, theta.linear, theta.quadratic, theta.exponents, theta.constants,
        partials.counts, partials.sums, partials.scatter, n_padded, first, slices,
        STRIDE=stride, STEP=launches.step, SLICE=launches.slice, GRANULE=granule_of(parameters.problem),
        DIAG=parameters.is_diag, PRECISION=product,
        BLOCK_ROWS=tile.rows, BLOCK_COMPONENTS=tile.components, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _accumulate_widest(
    rows: Tensor, parameters: TritonParameters, granule: int, first: int, partials: Partials
) -> None:
    """The same from stored rows, in fp64, one granule at a time."""
    problem = parameters.problem
    for i, own in enumerate(rows.split(granule)):
        shift, _ = parameters.origins[torch.float64]
        exact = Statistics.zeros(
            problem.covariance_type, problem.n_components, shift[: problem.n_features], rows.device
        )
        WIDEST.accumulate(own, parameters.double, exact)
        for name in ("counts", "sums", "scatter"):
            partial = getattr(partials, name)[i]
            values = getattr(exact, name)[first : first + len(partial)]
            partial[tuple(slice(0, size) for size in values.shape)] = values


def _add(total: Tensor, partials: Tensor) -> None:
    """total (k, w) fp64 += partials (granules, K' ≥ k, w' ≥ w), granule by granule."""
    block = 256
    granules, components, padded_width = partials.shape
    device_code.add_partials[(triton.cdiv(total.numel(), block),)](
        total, partials, total.numel(), total.shape[1], padded_width, granules, components * padded_width, BLOCK=block
    )
