"""What a pass costs: seconds of each stage, from how much there is and how fast each part of the way goes.

Stages work at the same time, so a pass takes as long as its slowest one, and what is done between passes besides.
`streamgmm bench` puts in rates that it measures; docs/recipes.md puts in those of one machine for data that nobody has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamgmm.statistics import SEGMENTS

EFFICIENCY = {"spherical": 0.35, "tied": 0.35, "diag": 0.35, "full": 0.55}
"""Of the fused kernels: their products a second over the device's, on realistic rows (docs/benchmarks.md)."""

_SUMS_SENT = 6
"""Finished nodes of the tree that a process sends at most after a pass: one a level."""


@dataclass(frozen=True)
class Data:
    """What is passed over.

    Attributes
    ----------
    n_samples, n_features : int
    itemsize : float
        Bytes a value, as it crosses to the device.
    stored_bytes : float
        Of files or objects that a pass reads.
    """

    n_samples: float
    n_features: int
    itemsize: float
    stored_bytes: float

    @property
    def size(self) -> float:
        """Bytes of the rows."""
        return self.n_samples * self.n_features * self.itemsize


@dataclass(frozen=True)
class Rates:
    """How fast each part of the way goes, bytes a second; ``rows`` in rows. Zero: there is no such part.

    ``disk`` and ``source`` (page cache to memory, decoding included) are of one machine, ``link`` (memory to device)
    and ``rows`` (the E-step) of one process, ``network`` between processes. ``between`` is what the host does between
    passes, in seconds.
    """

    disk: float = 0.0
    source: float = 0.0
    link: float = 0.0
    rows: float = 0.0
    network: float = 0.0
    between: float = 0.0


def stage_seconds(
    data: Data, rates: Rates, processes: int = 1, machines: int = 1, sums_bytes: float = 0.0
) -> dict[str, float]:
    """Seconds of a pass by stage, each as if it were alone, with ``processes`` on ``machines`` altogether.

    More processes than segments have nothing to do.
    """
    per_machine = processes / machines
    processes = min(processes, SEGMENTS)
    machines = min(machines, round(processes / per_machine) or 1)

    def seconds(amount: float, rate: float, times: int) -> float:
        return amount / (rate * times) if rate > 0 else 0.0

    return {
        "disk": seconds(data.stored_bytes, rates.disk, machines),
        "source": seconds(data.size, rates.source, machines),
        "link": seconds(data.size, rates.link, processes),
        "kernel": seconds(data.n_samples, rates.rows, processes),
        "reduction": seconds(sums_bytes * _SUMS_SENT * (processes - 1), rates.network, 1),
    }


def slowest(stages: Mapping[str, float]) -> str:
    """The stage that a pass waits for."""
    return max(stages, key=lambda stage: stages[stage])


def pass_seconds(stages: Mapping[str, float], rates: Rates) -> float:
    """Seconds of a pass: its slowest stage, and then the sums of all and what the host does with them."""
    streamed = {name: value for name, value in stages.items() if name != "reduction"}
    return max(streamed.values()) + stages.get("reduction", 0.0) + rates.between


def flops_per_row(n_components: int, n_features: int, covariance_type: str, live: float) -> float:
    """Products and sums of the E-step of one row: all densities once, those of the ``live`` share of pairs twice more.

    K·D for spherical and tied, twice that for diag (x and x²), K·D² for full; two operations a product.
    """
    terms = {"spherical": 1, "tied": 1, "diag": 2, "full": n_features}[covariance_type]
    return 2.0 * n_components * n_features * terms * (1 + 2 * live)


def kernel_rows(n_components: int, n_features: int, covariance_type: str, live: float, device_flops: float) -> float:
    """Rows a second of the fused kernels on a device of so many dense 16-bit operations a second."""
    work = flops_per_row(n_components, n_features, covariance_type, live)
    return device_flops * EFFICIENCY[covariance_type] / work
