"""Working precision: what ``auto`` measures, and when it moves on."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from streamgmm.estep import BoundMixture, bind, e_step
from streamgmm.frame import Frame
from streamgmm.kernels import PRECISIONS, Problem, available_precisions
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

MAX_MEAN_ABSOLUTE = 1e-2
MAX_BIAS = 1e-3
MAX_STATISTIC = 1e-3

CHECK_ROWS = 1024
"""Rows on which ``auto`` compares a kernel with fp64 where they have to be fetched for it, and on a CPU."""

_CHECK_ROWS_ON_GPU = 8192
"""Of the seeding sample, at every iteration: fp64 of them is a few milliseconds. Rounding of single responsibilities
averages out in a component's sums, but not over the one row that 1,024 leave each of a thousand components."""

_WORTH_CHECKING = 1 << 25


@dataclass(frozen=True)
class Deviation:
    """A kernel against fp64 on the same rows.

    Attributes
    ----------
    mean_absolute : float
        Mean |Δ log p(x)|, nats.
    bias : float
        |mean Δ log p(x)|, nats.
    statistic : float
        Largest relative error of counts, sums and scatter about each component's mean.
    """

    mean_absolute: float
    bias: float
    statistic: float

    @property
    def acceptable(self) -> bool:
        """Within DESIGN's bounds; NaN never is."""
        return self.mean_absolute <= MAX_MEAN_ABSOLUTE and self.bias <= MAX_BIAS and self.statistic <= MAX_STATISTIC


def first_precision(requested: str, products: float = inf) -> str:
    """The precision a run starts in.

    Where a pass on a CPU takes so few ``products`` (rows × components × features of φ), ``auto`` is fp64 throughout:
    comparing float32 with it at every iteration would cost more than float32 saves.
    """
    if requested != "auto":
        return requested
    return PRECISIONS[-1] if products < _WORTH_CHECKING else PRECISIONS[0]


def next_precision(precision: str) -> str | None:
    """The next wider one, or None after the widest."""
    index = PRECISIONS.index(precision) + 1
    return PRECISIONS[index] if index < len(PRECISIONS) else None


def choose_precision(
    mixture: Mixture, frame: Frame, precision: str, check_rows: Tensor, workers: int, hard: bool = False
) -> str:
    """The narrowest available precision from ``precision`` on that agrees with fp64 on ``check_rows`` (n, D)."""
    return bind_checked(mixture, frame, precision, check_rows, workers, hard).precision


def bind_checked(
    mixture: Mixture, frame: Frame, precision: str, check_rows: Tensor, workers: int, hard: bool = False
) -> BoundMixture:
    """``mixture`` bound at what `choose_precision` chooses."""
    problem = Problem(mixture.n_components, mixture.n_features, mixture.covariance_type)
    available = available_precisions(problem, check_rows.device, hard)
    exact = bind(mixture, frame, PRECISIONS[-1], check_rows.device, workers, hard)
    for wider in PRECISIONS[PRECISIONS.index(precision) : -1]:
        if wider not in available:
            continue
        fast = bind(mixture, frame, wider, check_rows.device, workers, hard)
        if deviation(fast, exact, check_rows, hard).acceptable:
            return fast
    return exact


def deviation(fast: BoundMixture, exact: BoundMixture, rows: Tensor, hard: bool = False) -> Deviation:
    """How far ``fast`` is from ``exact``, the same mixture in fp64, on ``rows`` (n, D), on their device."""
    difference = fast.log_likelihood(rows) - exact.log_likelihood(rows)
    if hard:
        # A row as near to one component as to another may go to either: only what both assign alike can be compared.
        rows = rows[_labels(fast, rows) == _labels(exact, rows)]
    pairs = zip(_statistics(fast, rows), _statistics(exact, rows), strict=True)
    return Deviation(
        mean_absolute=float(difference.abs().mean()),
        bias=float(difference.mean().abs()),
        statistic=max(_relative(a, b) for a, b in pairs),
    )


def _labels(bound: BoundMixture, rows: Tensor) -> Tensor:
    """The component of each row, (n,)."""
    return bound.kernel.top(rows, bound.parameters, 1).labels[:, 0]


def _statistics(bound: BoundMixture, rows: Tensor) -> tuple[Tensor, ...]:
    statistics = bound.empty_statistics()
    e_step(rows, bound, statistics)
    return _about_own_means(bound.finish(statistics), bound.mixture, bound.frame)


def _about_own_means(statistics: Statistics, mixture: Mixture, frame: Frame) -> tuple[Tensor, ...]:
    """Counts, sums and scatter about each component's own mean, where cancellation shows.

    Sums of deviations nearly vanish at a fixed point, so they are measured as a fraction of n·σ: each is returned
    beside the root of count times scatter, and the pair is compared as one vector.
    """
    means = torch.as_tensor((mixture.means - frame.shift) * frame.scale, device=statistics.sums.device)
    counts, sums, kind = statistics.counts, statistics.sums, statistics.covariance_type
    if kind == "tied":
        origin = (counts[:, None] * means).sum(0) / counts.sum()
        scatter = statistics.recentre(origin).scatter
        return counts, sums, scatter
    if kind == "full":
        i, j = torch.triu_indices(means.shape[1], means.shape[1], device=means.device)
        cross = means[:, i] * sums[:, j] + means[:, j] * sums[:, i]
        scatter = statistics.scatter - cross + counts[:, None] * means[:, i] * means[:, j]
        trace = scatter[:, i == j]
    else:
        change = -2 * means * sums + counts[:, None] * means**2
        scatter = statistics.scatter + (change if kind == "diag" else change.sum(1))
        trace = scatter
    deviations = sums - counts[:, None] * means
    spread = (counts * trace.clamp(min=0).reshape(len(counts), -1).sum(1)).sqrt()
    return counts, torch.cat([deviations, spread[:, None]], dim=1), scatter


def _relative(fast: Tensor, exact: Tensor) -> float:
    scale = float(exact.norm())
    error = float((fast - exact).norm())
    return error / scale if scale > 0 else error


def check_rows_on(device: torch.device) -> int:
    """Most rows of the seeding sample that ``auto`` checks on a device."""
    return CHECK_ROWS if device.type == "cpu" else _CHECK_ROWS_ON_GPU


def check_sample(sample: Tensor, device: torch.device) -> Tensor:
    """The rows of the seeding sample (n, D) that ``auto`` checks, evenly spread, on ``device``."""
    step = max(1, -(-len(sample) // check_rows_on(device)))
    return sample[::step].contiguous().to(device)
