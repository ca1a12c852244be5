"""Seeds for many components: k-means‖ over every row against k-means++ on a sample, in time and quality.

    python tools/bench_seeding.py [--data sift] [-k 1024,16384] [--rows 200000] [--init kmeans,k-means++,k-means||]
                                  [--seeds 0] [--lloyd 5] [--device auto] [--output FILE]
    python tools/bench_seeding.py --table FILE

Each line of JSON is a `streamgmm fit --model kmeans`: seconds (of the clock, and of all cores together) and passes
until its first Lloyd pass began, and the inertia (mean squared distance to the nearest centre, over all rows) of the
seeds and after each Lloyd pass. The sample is the product's, by N, D and K.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

import numpy as np
from passes_bench.datasets import MAKERS, data_set
from passes_bench.records import note, noted

from streamgmm.algorithm import sampled_rows
from streamgmm.fitting import fit
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.state import TrainingState
from streamgmm.steps.kmeans import inertia

Run = dict[str, object]


class FirstChunk(Progress):
    """When training began, and after how many rows read."""

    def __init__(self) -> None:
        self.at, self.cpu, self.rows_read = 0.0, 0.0, 0

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        if not self.at:
            self.at, self.cpu = time.perf_counter(), time.process_time()
            self.rows_read = state.rows_read - state.rows_summed(n_samples)


def run(name: str, rows: np.ndarray, k: int, init: str, seed: int, lloyd: int, device: str) -> Run:
    """One line of the output."""
    request = FitRequest(
        k, "spherical", model="kmeans", init=init, seed=seed, tol=0.0, max_iter=lloyd + 1, device=device
    )
    seen, begun, cpu = FirstChunk(), time.perf_counter(), time.process_time()
    result = fit(ArraySource(rows), request, progress=seen)
    return {
        "data": name,
        "n": len(rows),
        "d": rows.shape[1],
        "k": k,
        "init": init,
        "seed": seed,
        "sample": sampled_rows(request, ArraySource(rows)),
        "seeding_seconds": round(seen.at - begun, 1),
        "seeding_cpu_seconds": round(seen.cpu - cpu, 1),
        "seeding_passes": round(seen.rows_read / len(rows), 3),
        "lloyd_seconds": round((result.seconds - (seen.at - begun)) / (lloyd + 1), 2),
        "inertia": [round(inertia(result.mixture, bound), 6) for bound in result.lower_bounds],
    }


def table(runs: list[Run]) -> str:
    """Markdown; inertias relative to the first method's on the same problem."""
    lines = [
        "| data | N | D | K | sample | init | CPU seconds | passes | inertia of seeds | after Lloyd |",
        "|---" * 10 + "|",
    ]
    first: dict[tuple[object, ...], list[float]] = {}
    for found in runs:
        problem = tuple(found[name] for name in ("data", "n", "d", "k", "seed"))
        values = [float(value) for value in found["inertia"]]  # type: ignore[attr-defined]
        base = first.setdefault(problem, values)
        gains = [f"{values[i]:.4f} ({values[i] / base[i] - 1:+.1%})" for i in (0, -1)]
        cells = [
            found[name] for name in ("data", "n", "d", "k", "sample", "init", "seeding_cpu_seconds", "seeding_passes")
        ]
        lines.append("| " + " | ".join(map(str, [*cells, *gains])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sift", help=f"of {', '.join(MAKERS)}")
    parser.add_argument("-k", default="1024,16384")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--init", default="kmeans,k-means++,k-means||")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lloyd", type=int, default=5, help="passes after seeding")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/passes_data"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/bench_seeding.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of the runs in this file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(noted(arguments.table)))
        return
    for name in arguments.data.split(","):
        rows = data_set(name, arguments.cache, arguments.rows).training
        asked = product(
            map(int, arguments.k.split(",")), map(int, arguments.seeds.split(",")), arguments.init.split(",")
        )
        for k, seed, init in asked:
            note(arguments.output, run(name, rows, k, init, seed, arguments.lloyd, arguments.device))


if __name__ == "__main__":
    main()
