"""``medium``: rows and parameters in fp16, sums in fp32 about the origin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamgmm.kernels import Problem
from streamgmm.kernels.fused import joint
from streamgmm.kernels.fused import rows as row_code
from streamgmm.kernels.fused import stored as stored_code
from streamgmm.kernels.fused import sums as sum_code
from streamgmm.kernels.fused.configs import (
    COMPONENT_TILE,
    Launches,
    granule_of,
    launches_of,
    overlaps_products,
    stride_of,
)
from streamgmm.kernels.fused.parameters import FusedParameters, Origins
from streamgmm.kernels.fused.split_form import SplitForm
from streamgmm.kernels.fused.working import LiveRows, Partials, RowWeights, WorkingRows, launch_shape
from streamgmm.statistics import Statistics

# Larger |x'| would overflow x'² in fp16, and larger |y| of whitened rows y itself.
_LARGEST = {"diag": 255.0, "spherical": 255.0, "tied": 1024.0}


@dataclass(frozen=True, eq=False)
class HalfForm:
    """`Form` of fp16 numbers. x is (n', D') fp16; norms are ‖x‖² (n',) fp32 of the rounded x."""

    parameters: FusedParameters

    offset = 0.0
    moment_type = torch.float32

    @staticmethod
    def row_bytes(problem: Problem) -> int:
        return 2 * stride_of(problem.n_features) + 12

    @staticmethod
    def pair_bytes(problem: Problem, architecture: str) -> int:
        return 2 if _stores_responsibilities(problem, launches_of(problem, "medium", architecture)) else 0

    @staticmethod
    def other_bytes(problem: Problem, architecture: str) -> int:
        return 0

    @property
    def lacks_norm(self) -> bool:
        return self.parameters.is_tied

    @property
    def wider(self) -> SplitForm:
        return SplitForm(self.parameters)

    def convert(self, rows: Tensor, n_padded: int, flags: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.parameters
        problem, granule = parameters.problem, granule_of(parameters.problem)
        if not parameters.is_tied:
            return convert_half(rows, n_padded, flags, parameters.origins, problem.covariance_type, granule)
        n, d = rows.shape
        stride, factor = stride_of(d), parameters.half_factor
        x = torch.empty((n_padded, stride), dtype=torch.float16, device=rows.device)
        norms = torch.empty(n_padded, dtype=torch.float32, device=rows.device)
        shift, scale = origin_for(rows, parameters.origins)
        row_code.whiten_rows[(n_padded // 64,)](
            rows, shift, scale, factor.high, factor.low, factor.exponents, x, norms, flags, n,
            D=d, STRIDE=stride, GRANULE=granule, LIMIT=_LARGEST["tied"],
            BLOCK_ROWS=64, BLOCK_OUT=min(stride, 128), STEP=min(stride, 32), num_warps=4, num_stages=2,
        )  # fmt: skip
        return x, norms

    def log_sum_exp(self, working: WorkingRows) -> None:
        tile = self._launches.log_sum_exp
        theta = self.parameters.half
        if overlaps_products(self.parameters.problem, self.parameters.architecture) and not theta.scaled:
            from streamgmm.kernels.fused import hopper  # which needs Gluon

            hopper.log_sum_exp(working, theta)
            return
        joint.log_sum_exp[(working.n_padded // tile.rows,)](
            working.x, working.norms, *self._mixture, working.lse, working.maxima,
            working.n_rows, len(theta.constants) // tile.components, working.n_padded,
            STEP=self._launches.step, MAXIMA=working.maxima.numel() > 0, TILE=COMPONENT_TILE,
            **self._shared, **launch_shape(tile),
        )  # fmt: skip

    def best_components(
        self, working: WorkingRows, best: Tensor, label: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> None:
        parameters, tile = self.parameters, self._launches.log_sum_exp
        joint.best_component[(working.n_padded // tile.rows,)](
            working.x, working.norms, *self._mixture, parameters.order, *(before or (best, label)), best, label,
            len(parameters.order) // tile.components, parameters.problem.n_components,
            STEP=self._launches.step, FIRST=before is None, **self._shared, **launch_shape(tile),
        )  # fmt: skip

    def sum_components(
        self, working: WorkingRows, live: LiveRows, weights: RowWeights | None, first: int, partials: Partials
    ) -> None:
        """As `Form` says. Responsibilities are stored first where one program cannot hold all features of a row."""
        if self._stores_responsibilities and not self.parameters.hard:
            self._sum_stored(working, live, weights, first, partials)
            return
        launches = self._launches
        tile, slices = launches.accumulate, working.x.shape[1] // launches.slice
        granules, components = partials.counts.shape
        sum_code.accumulate[(components // COMPONENT_TILE * slices, granules)](
            working.x, working.norms, working.lse, working.labels, *_weights_or_any(working, weights),
            live.lists, live.n_live, *self._mixture, partials.counts, partials.sums, partials.scatter,
            *_place(working, live, first), slices,
            SLICE=launches.slice, HARD=self.parameters.hard, WEIGHTED=weights is not None, TILE=COMPONENT_TILE,
            GRANULE=granule_of(self.parameters.problem), BLOCK_ROWS=tile.rows,
            num_warps=tile.warps, num_stages=tile.stages, **self._shared,
        )  # fmt: skip

    def _sum_stored(
        self, working: WorkingRows, live: LiveRows, weights: RowWeights | None, first: int, partials: Partials
    ) -> None:
        problem, launches, place = self.parameters.problem, self._launches, _place(working, live, first)
        granules, components = partials.counts.shape
        n_padded, stride = working.x.shape
        tiles, slices, granule = components // COMPONENT_TILE, stride // launches.slice, granule_of(problem)
        scaled, units = _weights_or_any(working, weights)
        shared = {"GRANULE": granule, "WEIGHTED": weights is not None, "TILE": COMPONENT_TILE}
        resp = torch.empty((tiles, n_padded, COMPONENT_TILE), dtype=torch.float16, device=working.x.device)
        tile = launches.respond
        blocks = -(-granule // tile.rows)
        stored_code.respond[(tiles, granules * blocks)](
            working.x, working.norms, working.lse, scaled, live.lists, live.n_live, *self._mixture, resp,
            *place, blocks,
            STEP=launches.step, BLOCK_ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
            **shared, **self._shared,
        )  # fmt: skip
        stored_code.count_stored[(tiles, granules)](
            working.norms, units, live.lists, live.n_live, resp, partials.counts, partials.scatter, *place,
            NORM=self.parameters.uses_norms, BLOCK_ROWS=128, num_warps=8, **shared,
        )  # fmt: skip
        tile = launches.accumulate
        stored_code.accumulate_stored[(tiles * slices, granules)](
            working.x, units, live.lists, live.n_live, resp, partials.sums, partials.scatter, *place, slices,
            STRIDE=stride, SLICE=launches.slice, DIAG=self.parameters.is_diag, BLOCK_ROWS=tile.rows,
            num_warps=tile.warps, num_stages=tile.stages, **shared,
        )  # fmt: skip

    def fill_moments(self, working: WorkingRows, weights: RowWeights | None, moments: Tensor) -> None:
        granules, stride, _ = moments.shape
        block = min(stride, 128)
        sum_code.second_moment[(stride // block, stride // block, granules)](
            working.x, *_weights_or_any(working, weights), moments, working.n_rows,
            STRIDE=stride, GRANULE=granule_of(self.parameters.problem), WEIGHTED=weights is not None,
            BLOCK_ROWS=64, BLOCK_FEATURES=block, num_warps=8 if block == 128 else 4, num_stages=3,
        )  # fmt: skip

    def about_origin(self, statistics: Statistics) -> Statistics:
        return statistics

    def from_origin(self, statistics: Statistics) -> Statistics:
        return statistics

    def move_to_origin(self, partials: Partials, first: int) -> None:
        pass

    @property
    def _launches(self) -> Launches:
        return launches_of(self.parameters.problem, "medium", self.parameters.architecture)

    @property
    def _stores_responsibilities(self) -> bool:
        return _stores_responsibilities(self.parameters.problem, self._launches)

    @property
    def _mixture(self) -> tuple[Tensor, ...]:
        theta = self.parameters.half
        return theta.linear, theta.quadratic, theta.exponents, theta.constants

    @property
    def _shared(self) -> dict[str, object]:
        parameters = self.parameters
        return {
            "STRIDE": stride_of(parameters.problem.n_features), "DIAG": parameters.is_diag,
            "NORM": parameters.uses_norms, "SCALED": parameters.half.scaled,
        }  # fmt: skip


def convert_half(
    rows: Tensor, n_padded: int, flags: Tensor, origins: Origins, covariance_type: str, granule: int
) -> tuple[Tensor, Tensor]:
    """x' of ``spherical`` and ``diag`` rows and its norms, as `HalfForm` has them; ``flags`` get a 1 as there."""
    n, d = rows.shape
    stride, is_diag = stride_of(d), covariance_type == "diag"
    x = torch.empty((n_padded, stride), dtype=torch.float16, device=rows.device)
    norms = torch.empty(1 if is_diag else n_padded, dtype=torch.float32, device=rows.device)
    shift, scale = origin_for(rows, origins)
    row_code.convert_rows[(n_padded // 32,)](
        rows, shift, scale, x, norms, flags, n,
        D=d, STRIDE=stride, GRANULE=granule, LIMIT=_LARGEST[covariance_type], DIAG=is_diag,
        BLOCK_ROWS=32, BLOCK_FEATURES=min(stride, 128), num_warps=4,
    )  # fmt: skip
    return x, norms


def origin_for(rows: Tensor, origins: Origins) -> tuple[Tensor, Tensor]:
    """Shift and scale in the type in which ``rows`` are centred."""
    return origins[torch.float64 if rows.dtype == torch.float64 else torch.float32]


def _stores_responsibilities(problem: Problem, launches: Launches) -> bool:
    """Whether r is computed once and stored, because several programs share a row's features."""
    return launches.step < stride_of(problem.n_features)


def _weights_or_any(working: WorkingRows, weights: RowWeights | None) -> tuple[Tensor, Tensor]:
    """Scaled weights and their units; without weights the kernels do not read what stands in for them."""
    return (working.lse, working.lse) if weights is None else (weights.scaled, weights.units)


def _place(working: WorkingRows, live: LiveRows, first: int) -> tuple[int, int, int]:
    """Pitch of the lists, first tile, and tiles in all."""
    return working.n_padded, first // COMPONENT_TILE, live.n_live.shape[1]
