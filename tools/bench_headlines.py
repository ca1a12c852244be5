"""The two headlines of Flash-GMM's paper, on one CUDA device in one run: how much faster, and how much more data.

    python tools/bench_headlines.py [--torchgmm PATH] [--output FILE]

``time``: one E-step over a million rows that lie on the device: torch's textbook E-step (fp32 and tf32 products),
torchgmm's (its log-probabilities and responsibilities alone: its trainer does not run with every Lightning), ours.
Then whole iterations over ``--rows`` float16 rows that stay on the device, textbook EM beside `streamgmm.fitting.fit`
with its M-step, its checks and its history.

``reach``: the most rows that each takes through an iteration while the allocator refuses more than ``--limit``: both
textbook E-steps write an N×K matrix, so their limit is found by bisection; ours is run on a hundred times the larger.

Needs some 30 GB of host memory. Prints JSON lines. ``--torchgmm`` is a folder with the package torchgmm in it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import torch
from estep_bench.clocks import milliseconds
from estep_bench.dense import DenseEStep, product_precision
from estep_bench.workloads import SHAPES, Workload, draw_rows, workload
from torch import Tensor

from streamgmm.estep import bind, e_step
from streamgmm.fitting import fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.mstep import m_step
from streamgmm.request import FitRequest
from streamgmm.result import FitResult

DEVICE = torch.device("cuda")
K, D = 1024, 128
ITERATIONS = 4

TorchGMM = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def torchgmm_log_prob(path: Path) -> TorchGMM:
    """Its log-probabilities, without its packages' __init__ files, which import Lightning."""
    for name in ("torchgmm", "torchgmm.bayes"):
        package = ModuleType(name)
        package.__path__ = [str(path.resolve().joinpath(*name.split(".")))]
        sys.modules[name] = package
    found: TorchGMM = importlib.import_module("torchgmm.bayes.core._jit").jit_log_normal
    return found


def torchgmm_e_step(log_prob: TorchGMM, case: Workload) -> Callable[[Tensor], Tensor]:
    """Responsibilities as its model's ``forward`` gives them and its training step exponentiates them, (n, K)."""
    mixture = case.mixture
    means, weights, covariances = (
        torch.tensor(values, dtype=torch.float32, device=DEVICE)
        for values in (mixture.means, mixture.weights, mixture.covariances)
    )
    precisions = covariances.rsqrt()

    def step(rows: Tensor) -> Tensor:
        joint = log_prob(rows, means, precisions, mixture.covariance_type) + weights.log()
        return (joint - joint.logsumexp(1, keepdim=True)).exp()

    return step


def one_step(case: Workload, torchgmm: TorchGMM | None) -> dict[str, float]:
    """Milliseconds of an E-step over rows on the device."""
    dense, rows = DenseEStep(case.mixture, case.frame, DEVICE), case.rows
    bound = bind(case.mixture, case.frame, "medium", DEVICE, 1)
    found = {"streamgmm": milliseconds(lambda: e_step(rows, bound, bound.empty_statistics()), DEVICE, 12)}
    for name, mode in (("dense torch, fp32", "highest"), ("dense torch, tf32", "high")):
        with product_precision(mode):
            found[name] = milliseconds(lambda: dense(rows), DEVICE, 5)
    if torchgmm is not None:
        step = torchgmm_e_step(torchgmm, case)
        found["torchgmm"] = milliseconds(lambda: step(rows), DEVICE, 5)
    return found


def iterations(case: Workload, rows: np.ndarray) -> dict[str, Any]:
    """Seconds of a whole iteration over ``rows`` that stay on the device."""
    resident, mixture, times = torch.as_tensor(rows).to(DEVICE), case.mixture, []
    for _ in range(ITERATIONS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        statistics, likelihoods = DenseEStep(mixture, case.frame, DEVICE)(resident)
        bound = float(likelihoods.double().mean())
        mixture = m_step(case.frame.restore(statistics), 1e-6, mixture).mixture
        times.append(time.perf_counter() - begun)
    del resident
    torch.cuda.empty_cache()
    result = fitted(rows, case.mixture.covariance_type, None)
    return {
        "rows": len(rows),
        "dense torch, fp32": median(times[1:]),
        "dense_lower_bound": bound,
        "streamgmm": median(seconds_an_iteration(result)),
        "lower_bound": result.lower_bounds[-1],
        "precisions": [record["precision"] for record in result.history],
        "seconds": seconds_an_iteration(result),
    }


def fitted(rows: np.ndarray, kind: str, limit: int | None) -> FitResult:
    request = FitRequest(K, kind, max_iter=ITERATIONS, tol=0.0, device="cuda", memory_limit=limit)
    return fit(ArraySource(rows), request)


def seconds_an_iteration(result: FitResult) -> list[float]:
    """Of every iteration but the first, which copies what stays on the device."""
    return [float(record["update_seconds"]) for record in result.history if record["iteration"]][1:]


def most_rows(step: Callable[[Tensor], object], limit: int) -> int:
    """The largest N, to one in 64, that ``step`` takes within ``limit`` bytes, rows included."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)

    def fits(n: int) -> bool:
        try:
            step(torch.zeros((n, D), device=DEVICE))
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    least, most = 0, limit // (4 * D)
    while most - least > max(1024, least // 64):
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return least


def reach(case: Workload, torchgmm: TorchGMM | None, distinct: np.ndarray, limit: int) -> dict[str, Any]:
    """The most rows for the peers, and a fit of a hundred times as many under the same limit."""
    once = DenseEStep(case.mixture, case.frame, DEVICE, chunk=1 << 40)
    found = {"dense torch": most_rows(once, limit)}
    if torchgmm is not None:
        found["torchgmm"] = most_rows(torchgmm_e_step(torchgmm, case), limit)
    n = 100 * max(found.values())
    rows = np.empty((n, D), np.float32)
    for start in range(0, n, len(distinct)):
        part = rows[start : start + len(distinct)]
        np.copyto(part, distinct[: len(part)])
        part[:, 0] += start * 1e-9  # no two rows are the same
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    result = fitted(rows, case.mixture.covariance_type, limit)
    seconds = time.perf_counter() - begun
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        **found,
        "streamgmm": n,
        "seconds": seconds,
        "seconds_an_iteration": median(seconds_an_iteration(result)),
        "peak_device_bytes": torch.cuda.max_memory_allocated(DEVICE),
        "reserved_device_bytes": torch.cuda.max_memory_reserved(DEVICE),
        "n_passes": result.n_passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchgmm", type=Path)
    parser.add_argument("--rows", type=int, default=100_000_000, help="of whole iterations")
    parser.add_argument("--limit", type=int, default=4 << 30, help="bytes of device memory")
    parser.add_argument("--covariance", nargs="+", default=["spherical", "diag"])
    parser.add_argument("--output", type=Path, help="a file for the JSON lines; otherwise stdout")
    arguments = parser.parse_args()
    output: TextIO = arguments.output.open("w") if arguments.output else sys.stdout
    torchgmm = None if arguments.torchgmm is None else torchgmm_log_prob(arguments.torchgmm)

    def tell(headline: str, kind: str, found: dict[str, Any]) -> None:
        facts = {"headline": headline, "n_components": K, "n_features": D, "covariance_type": kind, **found}
        print(json.dumps(facts), file=output, flush=True)

    shape = replace(SHAPES[0], n=1_000_000, k=K, d=D)
    drawn = draw_rows("realistic", shape, DEVICE)
    for kind in arguments.covariance:
        case = workload("realistic", drawn, K, kind)
        distinct = case.rows.cpu().numpy()
        tell("time of an E-step, ms, 1M rows", kind, one_step(case, torchgmm))
        many = np.tile(distinct.astype(np.float16), (-(-arguments.rows // len(distinct)), 1))[: arguments.rows]
        tell("time of an iteration, s", kind, iterations(case, many))
        del many
        tell(f"most rows under {arguments.limit} bytes", kind, reach(case, torchgmm, distinct, arguments.limit))


if __name__ == "__main__":
    main()
