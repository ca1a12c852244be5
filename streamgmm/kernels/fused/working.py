"""Rows in a working form, and the runs of granules that need a wider one.

A *form* is how numbers are held and multiplied: `HalfForm` of ``medium``, `SplitForm` of ``high``. Everything else, the
two launches, lists of live rows, partial sums and what is redone, is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
from torch import Tensor

from streamgmm.arriving import Arriving
from streamgmm.kernels import Problem
from streamgmm.kernels.fused import rows as row_code
from streamgmm.kernels.fused.configs import COMPONENT_TILE, ROW_PADDING, Tile, granule_of, stride_of
from streamgmm.kernels.fused.parameters import FusedParameters
from streamgmm.kernels.kept import KeptRows
from streamgmm.statistics import Statistics

# Where |lse| is larger, rounding the logits to fp32 moves responsibilities by more than a per cent. The density of
# many features is far from one without any row being far, hence the allowance that `normalise` adds for D.
_FAR_BITS = 2**17
NATS = 0.6931471805599453


class Form(Protocol):
    """A way to hold rows, and a mixture to multiply them by. What it stores is a function of a granule's rows alone.

    The static methods count device memory: bytes of a working row without its maxima; bytes that each row stores for
    each component between the launches; and what else the form takes while it works.
    """

    @property
    def parameters(self) -> FusedParameters: ...

    @staticmethod
    def row_bytes(problem: Problem) -> int: ...

    @staticmethod
    def pair_bytes(problem: Problem, architecture: str) -> int: ...

    @staticmethod
    def other_bytes(problem: Problem, architecture: str) -> int: ...

    @property
    def offset(self) -> float:
        """Bits that each l and lse lacks."""
        ...

    @property
    def lacks_norm(self) -> bool:
        """Whether l lacks −½ log₂e ‖x‖², which is then in ``norms``."""
        ...

    @property
    def moment_type(self) -> torch.dtype:
        """Of a granule's second moment."""
        ...

    @property
    def wider(self) -> Form | None:
        """What takes the granules that this form cannot hold; after the last one it is fp64."""
        ...

    def convert(self, rows: Tensor, n_padded: int, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, D) and their norms in this form, padding and all; flags a granule that it cannot hold."""
        ...

    def log_sum_exp(self, working: WorkingRows) -> None:
        """Fill ``lse``, and ``maxima`` unless they are empty."""
        ...

    def best_components(
        self, working: WorkingRows, best: Tensor, label: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> None:
        """Fill ``best`` (n',) fp32 and ``label`` (n',) int32 with the largest l and its component, after ``before``.

        Where assignment is hard, labels are places among the tiles instead of components: the order is theirs.
        """
        ...

    def sum_components(
        self, working: WorkingRows, live: LiveRows, weights: RowWeights | None, first: int, partials: Partials
    ) -> None:
        """Fill the partials of the components in the places from ``first`` on."""
        ...

    def fill_moments(self, working: WorkingRows, weights: RowWeights | None, moments: Tensor) -> None:
        """Fill each granule's Σ w yyᵀ of ``tied``, (granules, D', D')."""
        ...

    def about_origin(self, statistics: Statistics) -> Statistics:
        """Statistics about the origin from those about whatever this form's sums are about."""
        ...

    def from_origin(self, statistics: Statistics) -> Statistics:
        """The inverse."""
        ...

    def move_to_origin(self, partials: Partials, first: int) -> None:
        """`about_origin` in place, of the components in the places from ``first`` on."""
        ...


@dataclass(frozen=True)
class WorkingRows:
    """Some granules of rows in working form, n' of them with the padding.

    Attributes
    ----------
    form : Form
    x : tensor
        x', or y for ``tied``, as the form has it; zero in the padding.
    norms : tensor
        ‖x‖² as the form has it; of no meaning for ``diag``.
    lse : (n',) fp32 tensor
        log₂ Σ 2^l, or the largest l where assignment is hard; +inf in the padding.
    labels : (n',) int32 tensor
        The place of the component of the largest l where assignment is hard; else of length one.
    maxima : (K' / TILE, n') fp32 tensor
        The largest l in each tile of components, and memory for the lists of live rows; empty where only ``lse`` is
        wanted.
    n_rows : int
        Rows without the padding.
    """

    form: Form
    x: Tensor
    norms: Tensor
    lse: Tensor
    labels: Tensor
    maxima: Tensor
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    @property
    def n_padded(self) -> int:
        return len(self.lse)


@dataclass(frozen=True)
class Flags:
    """One flag a granule, int32, where it was made and on its way to the host."""

    there: Tensor
    arriving: Arriving

    @classmethod
    def sent(cls, flags: Tensor) -> Flags:
        return cls(flags, Arriving.sent(flags))

    def wait(self) -> list[int]:
        """The flags, once they are on the host."""
        (flags,) = self.arriving.wait()
        return list(flags.tolist())


@dataclass(frozen=True)
class Partials:
    """One fp32 sum a granule, for a range of components.

    Attributes
    ----------
    counts : (granules, K') tensor
    sums : (granules, K', D') tensor
    scatter : tensor
        As ``sums`` for ``diag``, as ``counts`` for ``spherical``; empty for ``tied``.
    """

    counts: Tensor
    sums: Tensor
    scatter: Tensor

    def granules(self, first: int, last: int) -> Partials:
        return Partials(self.counts[first:last], self.sums[first:last], self.scatter[first:last])


@dataclass(frozen=True)
class LiveRows:
    """Rows that matter to each tile of components.

    Attributes
    ----------
    lists : (tiles, n') int32 tensor
        Numbers within each granule, in order, at the granule's place.
    n_live : (granules, tiles) int32 tensor
    """

    lists: Tensor
    n_live: Tensor


@dataclass(frozen=True)
class RowWeights:
    """Weights as the kernels multiply by them: ``scaled`` (n',) fp32 in [0, 1] times ``units`` (granules,) fp32."""

    exact: Tensor
    scaled: Tensor
    units: Tensor

    def granules(self, first: int, last: int, granule: int) -> RowWeights:
        rows = slice(first * granule, last * granule)
        return RowWeights(self.exact[rows], self.scaled[rows], self.units[first:last])


@dataclass(frozen=True)
class Redone:
    """Granules to be taken again: in a wider form, or stored rows for fp64."""

    first_granule: int
    rows: WorkingRows | Tensor


def normalise(rows: Tensor | KeptRows, form: Form, maxima: bool) -> tuple[WorkingRows, Flags]:
    """Rows with their log-sum-exp, and which granules want a wider form. Nothing is waited for."""
    parameters = form.parameters
    n, granule = len(rows), granule_of(parameters.problem)
    n_padded = -(-n // ROW_PADDING) * ROW_PADDING
    flags = torch.zeros(-(-n // granule), dtype=torch.int32, device=rows.device)
    if isinstance(rows, KeptRows):
        x, norms = rows.padded(n_padded, stride_of(parameters.problem.n_features), granule, flags)
    else:
        x, norms = form.convert(rows.contiguous(), n_padded, flags)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=rows.device)

    working = WorkingRows(
        form=form,
        x=x,
        norms=norms,
        lse=empty(n_padded),
        labels=empty(n_padded if parameters.hard else 1, dtype=torch.int32),
        maxima=empty(len(parameters.order) // COMPONENT_TILE if maxima else 0, n_padded),
        n_rows=n,
    )
    if parameters.hard:
        form.best_components(working, working.lse, working.labels, None)
        working.lse[n:] = torch.inf
    else:
        form.log_sum_exp(working)
    row_code.flag_far_rows[(triton.cdiv(n, 1024),)](
        working.lse, flags, n, FAR=_FAR_BITS + 64 * parameters.problem.n_features, GRANULE=granule, BLOCK_ROWS=1024
    )
    return working, Flags.sent(flags)


def redo(rows: Tensor, working: WorkingRows, flags: list[int], maxima: bool) -> list[Redone]:
    """The runs of granules that ``flags`` marks, in a wider form; their log-sum-exp replaces the narrower one.

    fp16 hands on to split rows, and these to fp64: a granule's own rows decide, so neither cuts nor other rows change a
    bit. Wider runs come after narrower ones.
    """
    form, parameters = working.form, working.form.parameters
    granule = granule_of(parameters.problem)
    redone: list[Redone] = []
    for first, last in _runs(flags):
        begin, end = first * granule, min(last * granule, len(rows))
        if form.wider is not None:
            again, wider = normalise(rows[begin:end], form.wider, maxima)
            runs = redo(rows[begin:end], again, wider.wait(), maxima)
            working.lse[begin:end] = again.lse[: end - begin] + (again.form.offset - form.offset)
            redone += [Redone(first, again), *(Redone(first + run.first_granule, run.rows) for run in runs)]
        else:
            # One granule at a time: the bits of a product depend on its shape.
            exact = [parameters.widest.log_likelihood(own, parameters.double) for own in rows[begin:end].split(granule)]
            working.lse[begin:end] = torch.cat(exact) / NATS - form.offset
            redone.append(Redone(first, rows[begin:end]))
        if form.lacks_norm:
            working.norms[begin:end] = 0.0  # nothing is left to be added
    return redone


def launch_shape(tile: Tile) -> dict[str, int]:
    """A first launch's tile as the arguments of a kernel."""
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COMPONENTS": tile.components,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _runs(flags: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open runs of non-zero flags."""
    first = None
    for i, flag in enumerate([*flags, 0]):
        if flag and first is None:
            first = i
        elif not flag and first is not None:
            yield first, i
            first = None
