"""The fused E-step on GPUs, for ``spherical``, ``diag`` and ``tied``: two launches, no N×K matrix, no atomics.

Rows are converted to x' a bounded number at a time. The first launch gives each row its log-sum-exp and its largest
logit in each tile of components. What lies 24 + log₂K bits below the log-sum-exp is left out of the second launch: at
most 2⁻²⁴ of a row's responsibility, all tiles together. Each granule's fp32 sums are stored apart and joined in fp64
in row order, so that bits never depend on how rows were cut into calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from streamgmm.device import on
from streamgmm.frame import Frame
from streamgmm.kernels import Problem, Run, TopComponents
from streamgmm.kernels.fused import rows as row_code
from streamgmm.kernels.fused import sums as sum_code
from streamgmm.kernels.fused.configs import COMPONENT_PADDING, COMPONENT_TILE, granule_of, stride_of
from streamgmm.kernels.fused.half_form import HalfForm
from streamgmm.kernels.fused.kept_form import HalfKept
from streamgmm.kernels.fused.parameters import FusedParameters
from streamgmm.kernels.fused.split_form import SplitForm
from streamgmm.kernels.fused.totals import Flagged, totals_of
from streamgmm.kernels.fused.working import (
    NATS,
    Form,
    LiveRows,
    Partials,
    Redone,
    RowWeights,
    WorkingRows,
    normalise,
    redo,
)
from streamgmm.kernels.kept import KeptForm, KeptRows
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

# Of the granules that are worked on at once. With K = 8192 and D = 128 they are 32: fewer leave multiprocessors idle in
# the last wave of programs, and the host nothing to do while the second launch runs.
_ROW_BYTES = 272 << 20
_MAXIMA_BYTES = 272 << 20
_PARTIAL_BYTES = 144 << 20
_RESP_BYTES = 384 << 20
_WEIGHT_BYTES = 4
# Beyond this share of live pairs it costs no more to visit all.
_DENSE_ABOVE = 0.6
_KEPT_BITS = 24


@dataclass(frozen=True)
class TritonKernel:
    """`Kernel` on a CUDA device, ``medium`` in `HalfForm` or ``high`` in `SplitForm`."""

    precision: str
    hard: bool = False
    architecture: str = "any"

    def granule(self, problem: Problem) -> int:
        return granule_of(problem)

    def scratch_bytes(self, problem: Problem, rows: int, workers: int, top: int = 0) -> int:
        granule = self.granule(problem)
        bounds = self._bounds(problem)
        granules = -(-min(rows, bounds.rows) // granule)
        row = self._form.row_bytes(problem) + _maxima_bytes(problem) + _WEIGHT_BYTES + 16 * min(top, 2)
        pair = self._form.pair_bytes(problem, self.architecture)
        partials = granules * (bounds.components * _component_bytes(problem) + self._moment_bytes(problem))
        own = granules * granule * (row + pair * bounds.components) + partials + 32 * granules
        again = 0
        if self.precision == "medium":
            redone = min(granules, bounds.redone)
            again = redone * granule * (SplitForm.row_bytes(problem) + _maxima_bytes(problem))
        other = SplitForm.other_bytes(problem, self.architecture)
        widest = TiledKernel(torch.float64).scratch_bytes(problem, granule, 1, top)
        return own + again + other + widest

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> FusedParameters:
        return FusedParameters(mixture, frame, device, self.precision, self.architecture, self.hard)

    def kept_form(self, parameters: FusedParameters) -> KeptForm | None:
        # Rows of ``tied`` are whitened by the mixture: those of the next pass are others.
        half = self.precision == "medium" and not parameters.is_tied
        kind = parameters.mixture.covariance_type
        return HalfKept(parameters.frame, kind, parameters.device) if half else None

    def accumulate(
        self,
        rows: Tensor | KeptRows,
        parameters: FusedParameters,
        statistics: Statistics,
        weights: Tensor | None = None,
    ) -> None:
        self.accumulate_runs(rows, parameters, [Run(0, len(rows), statistics)], weights)

    def accumulate_runs(
        self,
        rows: Tensor | KeptRows,
        parameters: FusedParameters,
        runs: Sequence[Run],
        weights: Tensor | None = None,
    ) -> None:
        with on(rows.device):
            self._in_pieces(_Call(rows, runs, weights), self._bounds(parameters.problem).rows, parameters)

    def _in_pieces(self, call: _Call, size: int, parameters: FusedParameters) -> None:
        for own in _pieces(len(call.rows), size):
            self._accumulate(call.piece(own), parameters)

    def _accumulate(self, call: _Call, parameters: FusedParameters) -> None:
        rows, granule, bounds = call.rows, granule_of(parameters.problem), self._bounds(parameters.problem)
        working, flags = normalise(rows, self._form(parameters), maxima=True)
        live = _live_rows(working)
        weights = None if call.weights is None else _scaled(call.weights, working.n_padded, granule)
        # The device is not kept waiting until the host knows of the flags: where one is set, this adds nothing.
        known = _add(call.runs, working, live, weights, (flags.there, len(flags.there)), bounds.components)
        marked = flags.wait()
        if any(marked) and isinstance(rows, KeptRows):
            del working, live, weights, known  # their memory is needed again
            self._accumulate_mixed(call, marked, parameters)
        elif sum(marked) > bounds.redone:
            self._in_pieces(call, bounds.redone * granule, parameters)
        elif any(marked):
            assert isinstance(rows, Tensor)
            found = redo(rows, working, marked, maxima=True)
            redone = [(r, _live_rows(r.rows) if isinstance(r.rows, WorkingRows) else None) for r in found]
            _add(call.runs, working, live, weights, (flags.there, 0), bounds.components, redone, known)

    def _accumulate_mixed(self, call: _Call, marked: list[int], parameters: FusedParameters) -> None:
        """Kept rows of which the ``marked`` granules want a wider form, which is made of stored rows, one granule's at
        a time: cuts change no bit."""
        granule, first = granule_of(parameters.problem), 0
        for wider, run in groupby(marked, bool):
            stop = min(first + granule * len(list(run)), len(call.rows))
            for own in _pieces(stop - first, granule if wider else stop - first):
                some = call.piece(slice(first + own.start, first + own.stop))
                self._accumulate(some.as_stored() if wider else some, parameters)
            first = stop

    def finish(self, statistics: Statistics, parameters: FusedParameters) -> Statistics:
        about_origin = self._form(parameters).about_origin(statistics)
        return about_origin if parameters.whitening is None else parameters.whitening.restore(about_origin)

    def log_likelihood(self, rows: Tensor, parameters: FusedParameters) -> Tensor:
        with on(rows.device):
            return torch.cat([_likelihood(working) for _, working, _ in self._normalised(rows, parameters)])

    def top(self, rows: Tensor, parameters: FusedParameters, m: int) -> TopComponents:
        with on(rows.device):
            pieces = [_ranked(*piece, m) for piece in self._normalised(rows, parameters)]
        return TopComponents(*(torch.cat(fields) for fields in zip(*pieces, strict=True)))

    def live_pairs(self, rows: Tensor, parameters: FusedParameters) -> float:
        """The share of (row, tile of components) pairs that the second launch visits, for the rows of one call."""
        with on(rows.device):
            visited = 0
            for own in rows.split(self._bounds(parameters.problem).rows):
                working, _ = normalise(own, self._form(parameters), maxima=True)
                visited += int(_live_rows(working).n_live.sum())
        return visited / (len(rows) * -(-parameters.problem.n_components // COMPONENT_TILE))

    def _normalised(
        self, rows: Tensor, parameters: FusedParameters
    ) -> Iterator[tuple[Tensor, WorkingRows, list[Redone]]]:
        """Rows a bounded number at a time, normalised, and the runs of them taken again."""
        bounds, granule = self._bounds(parameters.problem), granule_of(parameters.problem)
        for own in rows.split(bounds.rows):
            working, flags = normalise(own, self._form(parameters), maxima=False)
            marked = flags.wait()
            if sum(marked) > bounds.redone:
                for piece in _pieces(len(own), bounds.redone * granule):
                    yield from self._normalised(own[piece], parameters)
            else:
                yield own, working, redo(own, working, marked, maxima=False)

    @property
    def _form(self) -> type[HalfForm] | type[SplitForm]:
        return HalfForm if self.precision == "medium" else SplitForm

    def _moment_bytes(self, problem: Problem) -> int:
        return _moment_bytes(problem, self._form.moment_type)

    def _bounds(self, problem: Problem) -> _Bounds:
        return _bounds(problem, self._form, self.architecture)


@dataclass(frozen=True)
class _Bounds:
    """Rows converted at once, components accumulated at once, and granules redone at once in a wider working form.

    They keep scratch within its limits. Rows of which more than ``redone`` granules are redone are cut into pieces
    of as many: no bit depends on cuts.
    """

    rows: int
    components: int
    redone: int


@dataclass(frozen=True, eq=False)
class _Call:
    """Rows, the runs of them with the statistics that these are added to, and weights (n,)."""

    rows: Tensor | KeptRows
    runs: Sequence[Run]
    weights: Tensor | None

    def piece(self, own: slice) -> _Call:
        """Rows from one granule's first to another's."""
        cut = (Run(max(run.start, own.start), min(run.stop, own.stop), run.statistics) for run in self.runs)
        runs = [Run(run.start - own.start, run.stop - own.start, run.statistics) for run in cut if run.start < run.stop]
        return _Call(self.rows[own], runs, None if self.weights is None else self.weights[own])

    def as_stored(self) -> _Call:
        """The same of kept rows as they are stored. Raises as the source they are read from."""
        assert isinstance(self.rows, KeptRows)
        return replace(self, rows=self.rows.as_stored())


def _bounds(problem: Problem, form: type[HalfForm] | type[SplitForm], architecture: str) -> _Bounds:
    granule = granule_of(problem)
    n_padded = -(-problem.n_components // COMPONENT_PADDING) * COMPONENT_PADDING
    component, moment = _component_bytes(problem), _moment_bytes(problem, form.moment_type)
    pair = form.pair_bytes(problem, architecture)

    def affordable(granules: int) -> int:
        """Components whose partials and stored responsibilities keep within their limits."""
        by_partials = (_PARTIAL_BYTES // granules - moment) // component
        many = min(by_partials, _RESP_BYTES // (granules * granule * pair)) if pair else by_partials
        return min(n_padded, max(1, many // COMPONENT_PADDING) * COMPONENT_PADDING)

    granules = min(
        _held_granules(problem, form),
        _PARTIAL_BYTES // (affordable(1) * component + moment),
    )
    granules = max(1, granules)
    return _Bounds(granule * granules, affordable(granules), _held_granules(problem, SplitForm))


def _held_granules(problem: Problem, form: type[HalfForm] | type[SplitForm]) -> int:
    """Granules whose rows and maxima keep within their limits, at least one."""
    granule = granule_of(problem)
    by_rows = _ROW_BYTES // (granule * form.row_bytes(problem))
    return max(1, min(by_rows, _MAXIMA_BYTES // (granule * _maxima_bytes(problem))))


def _maxima_bytes(problem: Problem) -> int:
    """Bytes of a row's largest logits."""
    return 4 * -(-problem.n_components // COMPONENT_PADDING) * (COMPONENT_PADDING // COMPONENT_TILE)


def _component_bytes(problem: Problem) -> int:
    """Bytes of one component's partial."""
    planes = 2 if problem.covariance_type == "diag" else 1
    return 4 * (planes * stride_of(problem.n_features) + 2)


def _moment_bytes(problem: Problem, moment_type: torch.dtype) -> int:
    """Bytes of a granule's second moment."""
    return moment_type.itemsize * stride_of(problem.n_features) ** 2 if problem.covariance_type == "tied" else 0


def _pieces(n: int, size: int) -> Iterator[slice]:
    """``n`` rows, ``size`` at a time."""
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def _scaled(weights: Tensor, n_padded: int, granule: int) -> RowWeights:
    exact = weights.double()
    granules = -(-len(weights) // granule)
    scaled = torch.zeros(n_padded, dtype=torch.float32, device=weights.device)
    units = torch.empty(granules, dtype=torch.float32, device=weights.device)
    row_code.scale_weights[(granules,)](exact, scaled, units, len(weights), GRANULE=granule, BLOCK_ROWS=1024)
    return RowWeights(exact, scaled, units)


def _live_rows(working: WorkingRows) -> LiveRows:
    parameters = working.form.parameters
    tiles, n_padded = working.maxima.shape
    granule = granule_of(parameters.problem)
    granules = -(-working.n_rows // granule)
    lists = working.maxima.view(torch.int32)
    n_live = torch.empty((granules, tiles), dtype=torch.int32, device=lists.device)
    sum_code.list_live_rows[(tiles, granules)](
        working.maxima, working.lse, working.labels, lists, n_live, working.n_rows, n_padded,
        -(_KEPT_BITS + math.log2(parameters.problem.n_components)),
        GRANULE=granule, DENSE_ABOVE=_DENSE_ABOVE, HARD=parameters.hard, TILE=COMPONENT_TILE, BLOCK_ROWS=1024,
    )  # fmt: skip
    return LiveRows(lists, n_live)


def _empty_partials(problem: Problem, granules: int, components: int, device: torch.device) -> Partials:
    counts = torch.empty((granules, components), dtype=torch.float32, device=device)
    sums = torch.empty((granules, components, stride_of(problem.n_features)), dtype=torch.float32, device=device)
    return Partials(counts, sums, torch.empty_like(sums if problem.covariance_type == "diag" else counts))


def _add(
    runs: Sequence[Run],
    working: WorkingRows,
    live: LiveRows,
    weights: RowWeights | None,
    unless: Flagged,
    at_once: int,
    redone: Sequence[tuple[Redone, LiveRows | None]] = (),
    known: Partials | None = None,
) -> Partials | None:
    """Add the sums of normalised rows, ``at_once`` components together, ``unless`` a flag is set; waits for nothing.

    Gives the partials, to be ``known`` when some granules were ``redone``; None where they are too many to be kept.
    """
    parameters, form = working.form.parameters, working.form
    problem, granule, n_padded = parameters.problem, granule_of(parameters.problem), len(parameters.order)
    granules = -(-working.n_rows // granule)
    totals = totals_of(runs, granule)
    partials: Partials | None = None
    for first in range(0, n_padded, at_once):
        partials = known
        if partials is None:
            partials = _empty_partials(problem, granules, min(at_once, n_padded - first), working.x.device)
            form.sum_components(working, live, weights, first, partials)
        for again, again_live in redone:
            start, stop = again.first_granule, again.first_granule + -(-len(again.rows) // granule)
            replaced = partials.granules(start, stop)
            own = None if weights is None else weights.granules(start, stop, granule)
            if isinstance(again.rows, WorkingRows):
                assert again_live is not None
                again.rows.form.sum_components(again.rows, again_live, own, first, replaced)
                again.rows.form.move_to_origin(replaced, first)
            else:
                _sum_widest(again.rows, form, own, first, replaced)
        for some in totals:
            some.add_components(partials, parameters, first, unless)
    moments = _moments(working, redone, weights) if parameters.is_tied else None
    row_sums = _row_sums(working, weights, granules)
    for some in totals:
        if moments is not None:
            some.add_moments(moments, unless)
        some.add_rows(row_sums, unless)
    return partials if n_padded <= at_once else None


def _sum_widest(rows: Tensor, form: Form, weights: RowWeights | None, first: int, partials: Partials) -> None:
    """The partials of the components from ``first`` on from stored rows, in fp64, one granule at a time."""
    parameters = form.parameters
    places = parameters.order[first : first + partials.counts.shape[1]].long()
    places = places[places < parameters.problem.n_components]
    for i, exact in enumerate(_widest_statistics(rows, parameters, weights)):
        moved = form.from_origin(exact)
        pairs = [(partials.counts, moved.counts), (partials.sums, moved.sums)]
        if not parameters.is_tied:
            pairs.append((partials.scatter, moved.scatter))
        for partial, values in pairs:
            chosen = values[places]
            partial[i][tuple(slice(0, size) for size in chosen.shape)] = chosen


def _widest_statistics(rows: Tensor, parameters: FusedParameters, weights: RowWeights | None) -> Iterator[Statistics]:
    """Statistics of each granule of stored rows, in the kernel's coordinates about their origin."""
    problem, granule = parameters.problem, granule_of(parameters.problem)
    origin = torch.zeros(problem.n_features, dtype=torch.float64)
    for own in _pieces(len(rows), granule):
        exact = Statistics.zeros(problem.covariance_type, problem.n_components, origin, rows.device)
        parameters.widest.accumulate(
            rows[own], parameters.double, exact, None if weights is None else weights.exact[own]
        )
        yield exact if parameters.whitening is None else parameters.whitening.apply(exact)


def _moments(
    working: WorkingRows, redone: Sequence[tuple[Redone, LiveRows | None]], weights: RowWeights | None
) -> Tensor:
    """Each granule's Σ yyᵀ of ``tied``, (granules, D', D')."""
    form, parameters = working.form, working.form.parameters
    granule, stride = granule_of(parameters.problem), stride_of(parameters.problem.n_features)
    granules = -(-working.n_rows // granule)
    moments = torch.empty((granules, stride, stride), dtype=form.moment_type, device=working.x.device)
    form.fill_moments(working, weights, moments)
    for again, _ in redone:
        start, stop = again.first_granule, again.first_granule + -(-len(again.rows) // granule)
        some = None if weights is None else weights.granules(start, stop, granule)
        if isinstance(again.rows, WorkingRows):
            again.rows.form.fill_moments(again.rows, some, moments[start:stop])
        else:
            d = parameters.problem.n_features
            for i, exact in enumerate(_widest_statistics(again.rows, parameters, some)):
                moments[start + i, :d, :d] = exact.scatter
    return moments


def _row_sums(working: WorkingRows, weights: RowWeights | None, granules: int) -> Tensor:
    """Each granule's Σ w log p and Σ w, (granules, 2)."""
    form = working.form
    sums = torch.empty((granules, 2), dtype=torch.float64, device=working.lse.device)
    sum_code.sum_rows[(granules,)](
        working.lse, working.norms, working.lse if weights is None else weights.exact, sums, working.n_rows,
        COMMON=form.lacks_norm, GRANULE=granule_of(form.parameters.problem),
        WEIGHTED=weights is not None, BLOCK_ROWS=1024,
    )  # fmt: skip
    if form.offset:
        sums[:, 0] += NATS * form.offset * sums[:, 1]
    return sums


def _likelihood(working: WorkingRows) -> Tensor:
    bits = working.lse[: len(working)].double() + working.form.offset
    if working.form.lacks_norm:
        bits -= 0.5 / NATS * working.norms[: len(working)].double()
    return bits.mul_(NATS)


def _ranked(rows: Tensor, working: WorkingRows, redone: list[Redone], m: int) -> TopComponents:
    """The most responsible components of some rows, found one after the other."""
    parameters = working.form.parameters
    n_padded, device = working.n_padded, rows.device
    labels = torch.empty((len(rows), m), dtype=torch.int32, device=device)
    resp = torch.empty((len(rows), m), dtype=torch.float32, device=device)
    before: tuple[Tensor, Tensor] | None = None
    for i in range(m):
        best = torch.empty(n_padded, dtype=torch.float32, device=device)
        label = torch.empty(n_padded, dtype=torch.int32, device=device)
        working.form.best_components(working, best, label, before)
        labels[:, i] = label[: len(rows)]
        if parameters.hard:
            resp[:, i] = float(i == 0)
        else:
            resp[:, i] = (best - working.lse).exp2_()[: len(rows)]
        before = best, label
    for again in redone:
        granule = granule_of(parameters.problem)
        first = again.first_granule * granule
        own = slice(first, first + len(again.rows))
        if isinstance(again.rows, WorkingRows):
            found = _ranked(rows[own], again.rows, [], m)
            labels[own], resp[own] = found.labels, found.resp
        else:
            for start in range(first, first + len(again.rows), granule):
                some = slice(start, min(start + granule, own.stop))
                found = parameters.widest.top(rows[some], parameters.double, m)
                labels[some], resp[some] = found.labels, found.resp
    return TopComponents(_likelihood(working), labels, resp)
