"""Time the Triton E-step: conversion, log-sum-exp, accumulation, and a whole call. One JSON object a line.

    python tools/bench_estep.py [--rows-factor 1.0] [--repeats 12]

Every shape is first checked against fp64 on some of its rows; a wrong kernel is not timed. Times are medians of
repeats between CUDA events after a warm-up, in milliseconds. Rows are stored as float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import frame_of
from streamgmm.kernels import Problem
from streamgmm.kernels import triton_estep as estep
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

SHAPES = ((1_000_000, 1024, 128), (500_000, 1024, 768), (1_000_000, 16_384, 128))
CHECKED_ROWS = 20_000


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median device time of one call."""
    work()
    work()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


def bench(covariance_type: str, precision: str, rows: Tensor, means: Tensor, repeats: int) -> dict[str, object]:
    """Check, then time one kernel."""
    (n, d), k = rows.shape, len(means)
    rng = np.random.default_rng(1)
    covariances = rng.uniform(0.8, 1.25, (k,) if covariance_type == "spherical" else (k, d))
    mixture = Mixture(np.full(k, 1 / k), means.double().cpu().numpy(), covariances, covariance_type)
    frame = frame_of(rows[:10_000].cpu().numpy(), covariance_type)
    kernel = estep.TritonKernel(precision)
    parameters = kernel.parameters(mixture, frame, rows.device)
    oracle = TiledKernel(torch.float64)
    some = rows[:CHECKED_ROWS]
    exact = oracle.log_likelihood(some, oracle.parameters(mixture, frame, rows.device))
    error = float((kernel.log_likelihood(some, parameters) - exact).abs().mean())
    assert error < (5e-2 if precision == "medium" else 2e-3), f"wrong by {error} nats: not timed"
    statistics = Statistics.zeros(covariance_type, k, torch.zeros(d), rows.device)
    kernel.accumulate(rows, parameters, statistics)
    assert abs(float(statistics.counts.sum()) - n) < 0.5

    # The stages are timed on the rows that one call converts at once, and scaled to N.
    problem = Problem(k, d, covariance_type)
    span, width = estep._bounds(problem, kernel._working_type)
    granule = kernel.granule(problem)
    piece = rows[: min(span, n)]
    share = n / len(piece)
    working, _ = estep._convert(piece, parameters, kernel._working_type, granule)
    estep._log_sum_exp(working, parameters)
    partials = estep._empty_partials(problem, -(-len(piece) // granule), width, rows.device)
    ranges = -(-k // width)
    return {
        "n": n, "k": k, "d": d, "covariance_type": covariance_type, "precision": precision, "error_nats": error,
        "convert_ms": share
        * milliseconds(lambda: estep._convert(piece, parameters, kernel._working_type, granule), repeats),
        "log_sum_exp_ms": share * milliseconds(lambda: estep._log_sum_exp(working, parameters), repeats),
        "accumulate_ms": share
        * ranges
        * milliseconds(lambda: estep._accumulate(working, parameters, 0, partials), repeats),
        "join_ms": share * ranges * milliseconds(lambda: estep._add(statistics.sums[:width], partials.sums), repeats),
        "total_ms": milliseconds(lambda: kernel.accumulate(rows, parameters, statistics), repeats),
        "span_rows": span, "granule": granule,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-factor", type=float, default=1.0, help="a fraction of each shape's rows")
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    for n, k, d in SHAPES:
        torch.manual_seed(0)
        means = 2 * torch.randn((k, d), device=device)
        n = int(n * arguments.rows_factor)
        rows = means[torch.randint(0, k, (n,), device=device)].add_(torch.randn((n, d), device=device))
        for covariance_type in ("spherical", "diag"):
            for precision in ("medium", "high"):
                result = bench(covariance_type, precision, rows, means, arguments.repeats)
                print(
                    json.dumps({key: round(v, 6) if isinstance(v, float) else v for key, v in result.items()}),
                    flush=True,
                )


if __name__ == "__main__":
    main()
