"""flash-kmeans: one iteration of hard k-means, the bar that soft EM is to meet."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from .clocks import back_to_back, milliseconds
from .errors import checked_rows
from .session import Record
from .workloads import Workload


def measure_flash_kmeans(flash_kmeans: ModuleType, case: Workload, rows: Tensor, repeats: int) -> Record:
    """One iteration of hard k-means from the same means: assignment, then new centroids."""
    from_package = importlib.import_module(f"{flash_kmeans.__name__}.assign_euclid_triton")
    assign, update = from_package.euclid_assign_triton, flash_kmeans.triton_centroid_update_sorted_euclid
    x = rows[None]
    centroids = torch.tensor(case.mixture.means, device=rows.device).to(rows.dtype)[None]
    # Constant over the iterations of a fit, and computed once there too.
    norms = torch.cat([piece.float().square().sum(1) for piece in rows.split(65_536)])[None]
    labels = assign(x, centroids, norms, use_heuristic=True)

    some = rows[: len(checked_rows(case))].float()
    distances = torch.cdist(some, centroids[0].float()).square_()
    chosen = distances.gather(1, labels[0, : len(some), None].long())
    excess = float(chosen.sum() / distances.amin(1).sum()) - 1

    def iteration() -> None:
        update(x, assign(x, centroids, norms, use_heuristic=True), centroids)

    device = rows.device
    return {
        "ms": milliseconds(iteration, device, repeats),
        "queued_ms": back_to_back(iteration, device, repeats),
        "assign_ms": milliseconds(lambda: assign(x, centroids, norms, use_heuristic=True), device, repeats),
        "update_ms": milliseconds(lambda: update(x, labels, centroids), device, repeats),
        "excess_distortion": excess,
        "verdict": "ok" if excess < 1e-3 else "WRONG: not the nearest centroids",
    }
