"""What separates a kernel from fp64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from streamgmm.estep import BoundMixture, bind, e_step
from streamgmm.frame import Frame
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

from .workloads import Workload

WRONG = {"medium": (5e-2, 1e-2), "high": (2e-3, 1e-4)}
"""Mean |Δ log p| in nats, and relative error of a statistic, beyond which a kernel counts as broken."""

CONTRACT = {"medium": (1e-2, 1e-3), "high": (1e-4, 1e-5)}
"""What each precision promises on the data sets of ``--accuracy``, or ``auto`` must have moved on from it."""

LOST_SHARE = {"medium": 2e-5, "high": 1e-6}
"""Share of the rows by which Σ counts may differ from N.

Responsibilities just below one round to one in fp16, and more of them lie there than just above one half, so that
``medium`` counts up to 8e-6 rows too many a row, all components alike (docs/log.md, "Counts exceed N").
"""


def checked_rows(case: Workload) -> Tensor:
    """The rows (n, D) that meet fp64: fewer where many components make fp64 slow."""
    return case.rows[: 20_480 if case.mixture.n_components <= 4096 else 5120]


def lost_limit(precision: str, n_rows: int) -> float:
    """Rows that Σ counts may differ by from ``n_rows``."""
    return max(0.5, LOST_SHARE[precision] * n_rows)


@dataclass(frozen=True)
class Errors:
    """What separates a kernel from fp64, statistics about each component's own mean."""

    nats: float
    counts: float
    sums: float
    scatter: float

    @property
    def statistic(self) -> float:
        return max(self.counts, self.sums, self.scatter)

    def within(self, limits: tuple[float, float]) -> bool:
        """NaN never is."""
        return self.nats <= limits[0] and self.statistic <= limits[1]


@dataclass(frozen=True, eq=False)
class Exact:
    """Some rows in fp64: their statistics in the frame's coordinates, and log p of each (n,)."""

    statistics: Statistics
    log_likelihood: Tensor


def exact_of(mixture: Mixture, frame: Frame, rows: Tensor) -> Exact:
    """By `TiledKernel` in fp64, from the rows (n, D) as they are stored."""
    oracle = bind(mixture, frame, "highest", rows.device, 1)
    return Exact(oracle.finish(sums_of(oracle, rows)), oracle.log_likelihood(rows))


@lru_cache(maxsize=2)
def exact_of_checked(case: Workload, stored: torch.dtype) -> Exact:
    """Of `checked_rows` as ``stored``; kept, because fp64 takes longer than what it is held against."""
    return exact_of(case.mixture, case.frame, checked_rows(case).to(stored))


def errors_of(bound: BoundMixture, rows: Tensor, exact_rows: Exact) -> Errors:
    """A kernel on the rows (n, D) of which ``exact_rows`` tells the truth."""
    got, exact = bound.finish(sums_of(bound, rows)), exact_rows.statistics
    difference = bound.log_likelihood(rows) - exact_rows.log_likelihood
    means = exact.sums / exact.counts.clamp_min(1e-9)[:, None]
    scatter, exact_scatter = _scatter_about(got, means), _scatter_about(exact, means)
    sums, exact_sums = (s.sums - s.counts[:, None] * means for s in (got, exact))
    # Σ r (x − mean) is zero: its scale is what Cauchy and Schwarz allow, √Σ_k (Σr · Σr‖x − mean‖²).
    scale = float((_traces(exact_scatter, exact) * exact.counts).sum().sqrt())
    return Errors(
        nats=float(difference.abs().mean()),
        counts=_relative(got.counts, exact.counts),
        sums=float((sums - exact_sums).norm()) / max(scale, 1e-300),
        scatter=_relative(scatter, exact_scatter),
    )


def sums_of(bound: BoundMixture, rows: Tensor) -> Statistics:
    """The statistics of ``rows`` in the kernel's coordinates."""
    statistics = bound.empty_statistics()
    e_step(rows, bound, statistics)
    return statistics


def _scatter_about(statistics: Statistics, means: Tensor) -> Tensor:
    """Scatter about ``means`` (K, D), each component's own; for ``tied`` summed over components."""
    counts, sums, kind = statistics.counts[:, None], statistics.sums, statistics.covariance_type
    if kind == "tied":
        cross = means.T @ sums
        return statistics.scatter - cross - cross.T + (counts * means).T @ means
    if kind == "full":
        i, j = torch.triu_indices(means.shape[1], means.shape[1], device=means.device)
        cross = means[:, i] * sums[:, j] + means[:, j] * sums[:, i]
        return statistics.scatter - cross + counts * means[:, i] * means[:, j]
    change = -2 * means * sums + counts * means**2
    return statistics.scatter + (change if kind == "diag" else change.sum(1))


def _traces(scatter: Tensor, statistics: Statistics) -> Tensor:
    """Σ r‖x − mean‖² of each component, (K,); for ``tied`` the total, shared out by counts."""
    kind, counts = statistics.covariance_type, statistics.counts
    if kind == "tied":
        return scatter.trace() * counts / counts.sum()
    if kind == "full":
        i, j = torch.triu_indices(statistics.n_features, statistics.n_features, device=scatter.device)
        scatter = scatter[:, i == j]
    return scatter.reshape(len(counts), -1).sum(1).clamp_min(0)


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm().clamp_min(1e-300))


def same_bits(a: Statistics, b: Statistics) -> bool:
    names = ("counts", "sums", "scatter", "log_likelihood")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def peer_errors(case: Workload, log_likelihood: Tensor, counts: Tensor) -> dict[str, float | str]:
    """A peer's log p (n,) and counts (K,) over all rows: held against fp64 on some, and told where they are wrong."""
    exact = exact_of_checked(case, case.rows.dtype).log_likelihood
    error = float((log_likelihood[: len(exact)].double() - exact).abs().mean())
    lost = abs(float(counts.double().sum()) - len(case.rows))
    right = error <= WRONG["medium"][0] and lost <= lost_limit("medium", len(case.rows))
    return {"error_nats": error, "lost_rows": lost, "verdict": "ok" if right else "wrong"}
