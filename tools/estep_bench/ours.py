"""This project's kernels: held against fp64 first, then timed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from streamgmm.estep import bind, e_step
from streamgmm.kernels import Kernel
from streamgmm.kernels.tiled import TiledKernel

from .ceilings import Ceilings
from .clocks import back_to_back, milliseconds, once, stages
from .errors import WRONG, checked_rows, errors_of, exact_of_checked, lost_limit, same_bits, sums_of
from .session import Record
from .workloads import Workload


def measure_ours(
    case: Workload, rows: Tensor, precision: str, repeats: int, ceilings: Ceilings | None, overlap: Record
) -> Record:
    """Check against fp64, check that bits repeat and no row is lost, then time; ``overlap`` is `liveness`."""
    device = rows.device
    bound = bind(case.mixture, case.frame, precision, device, 1)
    errors = errors_of(bound, rows[: len(checked_rows(case))], exact_of_checked(case, rows.dtype))
    statistics = sums_of(bound, rows)
    lost = abs(float(bound.finish(statistics).counts.sum()) - len(rows))
    record = overlap | {
        "kernel": type(bound.kernel).__name__,
        "error_nats": errors.nats,
        "error_statistic": errors.statistic,
        "lost_rows": lost,
    }
    faults = []
    if not errors.within(WRONG[precision]):
        faults.append("differs from fp64")
    if not lost <= lost_limit(precision, len(rows)):
        faults.append("loses rows")
    if not same_bits(statistics, sums_of(bound, rows)):
        faults.append("bits differ between runs")
    if faults:
        return record | {"verdict": "WRONG: " + ", ".join(faults)}

    def first_use() -> None:
        # Parameters are derived when they are first asked for.
        fresh = bind(case.mixture, case.frame, precision, device, 1)
        e_step(rows[:1], fresh, fresh.empty_statistics())

    record["ms"] = milliseconds(lambda: e_step(rows, bound, statistics), device, repeats)
    record["queued_ms"] = back_to_back(lambda: e_step(rows, bound, statistics), device, repeats)
    record["parameters_ms"] = once(first_use, device)
    record["finish_ms"] = once(lambda: bound.finish(statistics), device)
    record["stages"] = stages(lambda: e_step(rows, bound, statistics), device)
    record |= live_share(bound.kernel, rows, bound.parameters, overlap["live_components"] / case.mixture.n_components)
    if ceilings is not None:
        record["floor_ms"] = ceilings.floor_ms(case, precision, rows.dtype, record["live_pairs"])
        record["share_of_floor"] = record["floor_ms"] / record["ms"]
    return record | {"verdict": "ok"}


def live_share(kernel: Kernel, rows: Tensor, parameters: Any, live_components: float) -> Record:
    """The share of pairs that the sums visit, and of what: rows and ``tiles``, or rows and ``components``.

    A kernel may tell by ``live_pairs``. `TiledKernel` visits all. Any other lists components one by one, by the same
    2⁻²⁴/K as `liveness`, whose share (0 to 1) is ``live_components``.
    """
    tell = getattr(kernel, "live_pairs", None)
    if tell is not None:
        return {"live_pairs": float(tell(rows, parameters)), "live_of": "tiles"}
    if isinstance(kernel, TiledKernel):
        return {"live_pairs": 1.0, "live_of": "components"}
    return {"live_pairs": live_components, "live_of": "components"}
