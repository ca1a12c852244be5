"""The cost model as tables: against passes that were measured, and carried to data that nobody has.

    python tools/cost_table.py                                          # both tables of docs/recipes.md
    python tools/cost_table.py --rows 1e12 --features 128 -k 4096 --machines 8 --gpus 8 --disk 20

Rates default to those measured on one H200 machine (docs/benchmarks.md): 784 TFLOP/s, 55 GB/s to each GPU, disks of
2 GB/s, and 8.7 GB/s from the page cache, checksums compared, with four reader threads, taken four times for sixteen.
"""

from __future__ import annotations

import argparse

from streamgmm.cost import Data, Rates, kernel_rows, pass_seconds, slowest, stage_seconds
from streamgmm.kernels import Problem
from streamgmm.memory import statistics_bytes

FLOPS, LINK, DISK, SOURCE, NETWORK = 784e12, 55e9, 2.0e9, 4 * 8.7e9, 10e9
BETWEEN = 0.33
"""Seconds of the host between passes, measured at K = 4096 and D = 128; taken to grow with K·D."""

KERNELS = [  # rows, K, D, covariance, live, milliseconds measured
    (1e6, 1024, 128, "spherical", 0.19, 1.32),
    (1e6, 1024, 128, "tied", 0.22, 1.61),
    (1e6, 1024, 128, "diag", 0.21, 2.82),
    (1e6, 1024, 128, "full", 0.15, 100.0),
    (1e6, 16384, 128, "spherical", 0.04, 15.5),
    (0.5e6, 1024, 768, "spherical", 0.30, 4.10),
]

CASES = [  # rows, D, K, machines, GPUs a machine, GB/s of a machine's disks
    (1e9, 128, 4096, 1, 1, 2),
    (1e9, 128, 4096, 1, 8, 20),
    (1e10, 128, 16384, 1, 8, 20),
    (1e11, 128, 16384, 4, 8, 20),
    (1e12, 128, 4096, 8, 8, 20),
    (1e12, 128, 16384, 8, 8, 20),
    (1e12, 128, 65536, 8, 8, 20),
    (1e12, 768, 65536, 8, 8, 80),
]


_STAGES = ("disk", "source", "link", "kernel", "reduction")


def measured() -> None:
    print("| N, K, D | | model, ms | measured, ms | model / measured |\n|---|---|---|---|---|")
    for rows, k, d, covariance, live, found in KERNELS:
        said = 1e3 * rows / kernel_rows(k, d, covariance, live, FLOPS)
        print(f"| {rows / 1e6:g}M, {k}, {d} | {covariance} | {said:.3g} | {found:g} | {said / found:.2f} |")
    data = Data(16e6, 128, 2, 0)
    rates = Rates(link=LINK, rows=kernel_rows(4096, 128, "diag", 0.06, FLOPS), between=BETWEEN)
    stages = stage_seconds(data, rates)
    said = pass_seconds(stages, rates)
    print(f"| 16M, 4096, 128, a pass from host memory | diag | {1e3 * said:.3g} | 560 | {said / 0.56:.2f} |")


def carried(cases: list[tuple[float, int, int, int, int, float]]) -> None:
    heads = ["rows", "D", "K", "data", "machines × GPUs", "their disks", *_STAGES, "a pass", "limited by"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for rows, d, k, machines, gpus, disk in cases:
        data = Data(rows, d, 2, rows * d * 2)
        kernel = kernel_rows(k, d, "diag", 0.05, FLOPS)
        rates = Rates(disk * 1e9, SOURCE, LINK, kernel, NETWORK, BETWEEN * k * d / (4096 * 128))
        stages = stage_seconds(data, rates, machines * gpus, machines, statistics_bytes(Problem(k, d, "diag")))
        cells = [f"10^{len(str(int(rows))) - 1}", d, k, f"{data.size / 1e12:g} TB", f"{machines} × {gpus}"]
        cells += [f"{disk:g} GB/s", *(_told(stages[name]) for name in _STAGES)]
        cells += [f"**{_told(pass_seconds(stages, rates))}**", slowest(stages)]
        print(f"| {' | '.join(map(str, cells))} |")


def _told(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("-k", "--components", type=int, default=4096)
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="Of each machine.")
    parser.add_argument("--disk", type=float, default=DISK / 1e9, help="GB/s of each machine's disks.")
    asked = parser.parse_args()
    if asked.rows is None:
        measured()
        print()
        carried(CASES)
        return
    carried([(asked.rows, asked.features, asked.components, asked.machines, asked.gpus, asked.disk)])


if __name__ == "__main__":
    main()
