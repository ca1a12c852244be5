"""How long a call takes on a device, and where the time goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from statistics import median

import torch

BUDGET_MS = 400.0
"""What the repeats of one measurement may take together, three calls at least."""


def once(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begun)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of up to ``repeats`` calls after a warm-up, three at least however long they are."""
    work()
    estimate = once(work, device)
    return median(once(work, device) for _ in range(max(3, min(repeats, int(BUDGET_MS / max(estimate, 1e-3))))))


def back_to_back(work: Callable[[], object], device: torch.device, passes: int) -> float:
    """Milliseconds a call where up to ``passes`` are queued and waited for together, as the passes of a fit follow."""
    estimate = once(work, device)
    n = max(2, min(passes, int(BUDGET_MS / max(estimate, 1e-3))))

    def queue() -> None:
        for _ in range(n):
            work()

    return median(once(queue, device) for _ in range(3)) / n


def stages(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds on the device of each kernel that one call launches, longest first."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in trace.key_averages():
        name = re.split(r"[<(]", event.key.removeprefix("void "))[0].split("::")[-1]
        spent[name] = spent.get(name, 0.0) + event.self_device_time_total / 1e3
    longest = sorted(spent.items(), key=lambda item: -item[1])[:8]
    return {name: value for name, value in longest if value >= 1e-3}
