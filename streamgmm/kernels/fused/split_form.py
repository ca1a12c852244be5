"""``high``: rows and parameters split into fp16 planes, sums in fp32 about the components' own centres."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamgmm.kernels import Problem
from streamgmm.kernels.fused import split, split_sums
from streamgmm.kernels.fused.configs import COMPONENT_TILE, Launches, granule_of, launches_of, stride_of
from streamgmm.kernels.fused.parameters import FusedParameters
from streamgmm.kernels.fused.split_parameters import Centres, SplitCoefficients, slice_of
from streamgmm.kernels.fused.working import LiveRows, Partials, RowWeights, WorkingRows, launch_shape
from streamgmm.statistics import Statistics

_FORM_BYTES = 192 << 20
# Rows that are fp64 for a moment: few launches, and little memory.
_WIDE_BYTES = 64 << 20
_MOVED_BYTES = 8 << 20
_ROWS_OF_A_PROGRAM = 16


@dataclass(frozen=True, eq=False)
class SplitForm:
    """`Form` of split numbers. x is (3, n', D') fp16 planes, 6 for ``diag``; norms are (2, slices, n') fp32.

    ``tied`` is ``spherical`` in y, its norms included.
    """

    parameters: FusedParameters

    moment_type = torch.float64
    lacks_norm = False
    wider = None

    @staticmethod
    def row_bytes(problem: Problem) -> int:
        norms = 8 * (stride_of(problem.n_features) // slice_of(problem.n_features))
        return 2 * _planes(problem) * stride_of(problem.n_features) + norms + 8

    @staticmethod
    def pair_bytes(problem: Problem, architecture: str) -> int:
        return 0  # `sum_components` takes as many components at once as memory allows

    @staticmethod
    def other_bytes(problem: Problem, architecture: str) -> int:
        granule = granule_of(problem)
        forms = 0
        if _stores_forms(problem, launches_of(problem, "high", architecture)):
            forms = max(_FORM_BYTES, 4 * granule * COMPONENT_TILE)
        # y takes shape beside what it is made of; its weighted copy and their product come later.
        wide = 8 * stride_of(problem.n_features) * (4 * _wide_rows(problem) + 2 * stride_of(problem.n_features))
        return max(forms, wide if problem.covariance_type == "tied" else 0) + 8 * _MOVED_BYTES

    @property
    def offset(self) -> float:
        return self._theta.offset

    def convert(self, rows: Tensor, n_padded: int, flags: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.parameters
        problem, units = parameters.problem, self._theta.units
        d, stride, width = problem.n_features, stride_of(problem.n_features), slice_of(problem.n_features)
        granule = granule_of(problem)
        x = torch.empty((_planes(problem), n_padded, stride), dtype=torch.float16, device=rows.device)
        norms = torch.empty((2, stride // width, n_padded), dtype=torch.float32, device=rows.device)
        shift, scale = parameters.origins[torch.float64]
        if parameters.is_tied:
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        for first, some in self._whitened(rows) if parameters.is_tied else [(0, rows)]:
            last = n_padded if first + len(some) == len(rows) else first + len(some)
            split.split_rows[((last - first) // _ROWS_OF_A_PROGRAM,)](
                some, shift, scale, x[:, first:], norms[:, :, first:], flags[first // granule :], len(some), n_padded,
                2.0**units.rows, 2.0**units.squares, 2.0**units.products, units.largest_row(parameters.is_diag),
                D=d, STRIDE=stride, SLICE=width, GRANULE=granule, DIAG=parameters.is_diag,
                BLOCK_ROWS=_ROWS_OF_A_PROGRAM, BLOCK_FEATURES=width,
            )  # fmt: skip
        return x, norms

    def log_sum_exp(self, working: WorkingRows) -> None:
        tile = self._launches.log_sum_exp
        split.split_log_sum_exp[(working.n_padded // tile.rows,)](
            working.x, working.norms, *self._mixture, working.lse, working.maxima,
            working.n_rows, working.n_padded, len(self.parameters.order),
            MAXIMA=working.maxima.numel() > 0, TILE=COMPONENT_TILE, **self._shared, **launch_shape(tile),
        )  # fmt: skip

    def best_components(
        self, working: WorkingRows, best: Tensor, label: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> None:
        parameters, tile = self.parameters, self._launches.log_sum_exp
        split.split_best_component[(working.n_padded // tile.rows,)](
            working.x, working.norms, *self._mixture, parameters.order, *(before or (best, label)), best, label,
            working.n_padded, len(parameters.order), parameters.problem.n_components,
            FIRST=before is None, **self._shared, **launch_shape(tile),
        )  # fmt: skip

    def sum_components(
        self, working: WorkingRows, live: LiveRows, weights: RowWeights | None, first: int, partials: Partials
    ) -> None:
        width = partials.counts.shape[1]
        step = width
        if _stores_forms(self.parameters.problem, self._launches):
            step = max(_FORM_BYTES // (4 * working.n_padded * COMPONENT_TILE), 1) * COMPONENT_TILE
        for begin in range(0, width, step):
            self._sum_some(working, live, weights, first, partials, begin, min(begin + step, width))

    def _sum_some(
        self,
        working: WorkingRows,
        live: LiveRows,
        weights: RowWeights | None,
        first: int,
        partials: Partials,
        begin: int,
        end: int,
    ) -> None:
        """Fill columns ``begin`` to ``end`` of the partials."""
        theta, launches, units = self._theta, self._launches, self._theta.units
        problem, n_padded = self.parameters.problem, working.n_padded
        granules, covered = partials.counts.shape
        granule, tiles = granule_of(problem), (end - begin) // COMPONENT_TILE
        place = (n_padded, len(self.parameters.order), (first + begin) // COMPONENT_TILE, live.n_live.shape[1])
        shared = self._shared | {"GRANULE": granule, "TILE": COMPONENT_TILE}
        given = _stores_forms(problem, launches)
        forms = working.lse
        if given:
            forms = torch.empty((tiles, n_padded, COMPONENT_TILE), dtype=torch.float32, device=forms.device)
            rows = launches.respond
            blocks = -(-granule // rows.rows)
            split_sums.split_forms[(tiles, granules * blocks)](
                working.x, working.norms, live.lists, live.n_live, theta.linear, theta.quadratic, theta.energies,
                forms, *place, blocks,
                BLOCK_ROWS=rows.rows, num_warps=rows.warps, num_stages=rows.stages, **shared,
            )  # fmt: skip
        some_weights = (working.lse, working.lse) if weights is None else (weights.scaled, weights.units)
        tile, parts = launches.accumulate, stride_of(problem.n_features) // launches.slice
        split_sums.split_accumulate[(tiles * parts, granules)](
            working.x, working.norms, working.lse, working.labels, *some_weights, live.lists, live.n_live,
            *self._mixture, theta.centres, forms,
            partials.counts[:, begin:], partials.sums[:, begin:], partials.scatter[:, begin:], *place, parts, covered,
            2.0**units.rows, 2.0**units.squares, 2.0**units.products,
            OWN=launches.slice, GIVEN=given, HARD=self.parameters.hard, WEIGHTED=weights is not None,
            BLOCK_ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, **shared,
        )  # fmt: skip

    def fill_moments(self, working: WorkingRows, weights: RowWeights | None, moments: Tensor) -> None:
        problem = self.parameters.problem
        step, per_granule = _wide_rows(problem), granule_of(problem) // _wide_rows(problem)
        length = 2.0**-self._theta.units.rows
        # Always whole steps, for the bits of the product; rows past the last are zero.
        y = torch.zeros((step, moments.shape[1]), dtype=torch.float64, device=moments.device)
        for granule in range(len(moments)):
            total = torch.zeros(moments.shape[1:], dtype=torch.float64, device=moments.device)
            for i in range(granule * per_granule, (granule + 1) * per_granule):
                own = slice(i * step, min((i + 1) * step, working.n_rows))
                some = working.x[:, own]
                if not some.shape[1]:
                    break
                y.zero_()
                y[: some.shape[1]] = some[0]
                y[: some.shape[1]].add_(some[1]).add_(some[2]).mul_(length)
                counted = y
                if weights is not None:
                    counted = y.clone()
                    counted[: some.shape[1]] *= weights.exact[own, None]
                total += counted.T @ y
            moments[granule] = total

    def about_origin(self, statistics: Statistics) -> Statistics:
        centres = self._centres_of_components
        sums = centres.sums_about_origin(statistics.counts, statistics.sums)
        scatter = statistics.scatter
        if not self.parameters.is_tied:
            scatter = centres.scatter_about_origin(statistics.counts, sums, scatter)
        return replace(statistics, sums=sums, scatter=scatter)

    def from_origin(self, statistics: Statistics) -> Statistics:
        centres = self._centres_of_components
        sums = centres.sums_about_centres(statistics.counts, statistics.sums)
        scatter = statistics.scatter
        if not self.parameters.is_tied:
            scatter = centres.scatter_about_centres(statistics.counts, statistics.sums, scatter)
        return replace(statistics, sums=sums, scatter=scatter)

    def move_to_origin(self, partials: Partials, first: int) -> None:
        width, stride = partials.sums.shape[1:]
        step = max(1, _MOVED_BYTES // (8 * stride))
        for begin in range(0, width, step):
            own = slice(begin, min(begin + step, width))
            places = torch.arange(first + own.start, first + own.stop, device=partials.counts.device)
            centres = self._theta.centres_at(places, stride)
            for i in range(len(partials.counts)):
                counts = partials.counts[i, own].double()
                sums = centres.sums_about_origin(counts, partials.sums[i, own].double())
                partials.sums[i, own] = sums
                if not self.parameters.is_tied:
                    scatter = partials.scatter[i, own].double()
                    partials.scatter[i, own] = centres.scatter_about_origin(counts, sums, scatter)

    @property
    def _theta(self) -> SplitCoefficients:
        return self.parameters.split

    @property
    def _centres_of_components(self) -> Centres:
        problem = self.parameters.problem
        places = self.parameters.order[: problem.n_components].argsort()
        return self._theta.centres_at(places, problem.n_features)

    @property
    def _launches(self) -> Launches:
        return launches_of(self.parameters.problem, "high", self.parameters.architecture)

    @property
    def _mixture(self) -> tuple[Tensor, ...]:
        theta = self._theta
        return theta.linear, theta.quadratic, theta.energies, theta.factors, theta.constants

    @property
    def _shared(self) -> dict[str, object]:
        d = self.parameters.problem.n_features
        return {
            "STRIDE": stride_of(d), "SLICE": slice_of(d), "STEP": self._launches.step, "DIAG": self.parameters.is_diag,
        }  # fmt: skip

    def _whitened(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """y fp64 of some rows at a time, and the first row's number; the memory is used again."""
        whitening = self.parameters.whitening
        assert whitening is not None
        factor = torch.as_tensor(whitening.factor, device=rows.device)
        # Always whole steps, for the bits of the product.
        step = _wide_rows(self.parameters.problem)
        x = torch.zeros((step, rows.shape[1]), dtype=torch.float64, device=rows.device)
        for first in range(0, len(rows), step):
            own = rows[first : first + step]
            x[: len(own)] = self.parameters.frame.apply(own, torch.float64)
            yield first, (x @ factor)[: len(own)]


def _planes(problem: Problem) -> int:
    return 6 if problem.covariance_type == "diag" else 3


def _stores_forms(problem: Problem, launches: Launches) -> bool:
    """Whether t is computed once and stored, because several programs share a row's features."""
    return launches.slice < stride_of(problem.n_features)


def _wide_rows(problem: Problem) -> int:
    """Rows in fp64 at a time: a power of two, which the granule is a multiple of."""
    rows = _WIDE_BYTES // (8 * stride_of(problem.n_features))
    return min(granule_of(problem), max(256, 1 << rows.bit_length() - 1))
