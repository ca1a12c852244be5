"""The textbook E-step in torch, timed: fp32 and tf32 products."""

from __future__ import annotations

from .clocks import milliseconds
from .dense import DenseEStep, product_precision
from .errors import peer_errors
from .session import Record
from .workloads import Workload

MODES = {"float32": "highest", "tf32": "high"}
"""torch's names for the precision of float32 products."""


def measure_torch(case: Workload, precision: str, repeats: int) -> Record:
    """One pass over the float32 rows; ``precision`` is one of `MODES`."""
    rows = case.rows
    dense = DenseEStep(case.mixture, case.frame, rows.device)
    with product_precision(MODES[precision]):
        statistics, log_likelihood = dense(rows)
        errors = peer_errors(case, log_likelihood, statistics.counts)
        return errors | {"ms": milliseconds(lambda: dense(rows), rows.device, min(repeats, 5))}
