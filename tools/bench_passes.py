"""EM in few passes: held-out likelihood against passes, on five data sets.

    python tools/bench_passes.py --product [--data patches,sift,text,heavy,imbalanced] [-k 32,256,1024] [--seeds 0,1,2]
                                 [--methods REGEX] [--covariance diag] [--sorted] [--output FILE]
    python tools/bench_passes.py --product --table FILE [--sorted] [--plot curves.svg]

fits every set with `streamgmm fit`'s own function, and scores the model after every pass on 10,000 rows held out:
30 full-batch passes, and five of stepwise EM, each with a sample of a tenth of the rows, which is counted. With
``--sorted``, whose rows are sorted by cluster, the baseline is full-batch EM after as many passes.

    python tools/bench_passes.py [--data patches,sift,text,heavy,imbalanced] [-k 32,256,1024] [--seeds 0,1,2]
                                 [--methods REGEX] [--covariance diag] [--sorted] [--output FILE]
    python tools/bench_passes.py --table FILE [--plot curves.svg]
    python tools/bench_passes.py --write FOLDER [--data sift] [--sorted]

compares schedules that were tried on the way, in a prototype over rows in memory.

Every method starts from the same uniform sample of a tenth of the rows, for which one whole pass is counted, and
counts each row it reads after that. The baseline is 30 full-batch iterations from k-means seeds on the sample. One line
of JSON a run: ``curve`` is the mean log-likelihood of 10,000 rows held out, before the first pass after the sample and
after each. A run that is in FILE already is not repeated. ``--sorted`` has the rows sorted by cluster instead, and
full-batch EM from the same start for a baseline. The data sets are made from what ships with the packages installed,
and kept in --cache. One compute thread. ``--write`` only leaves them in FOLDER as ``NAME.npy`` and
``NAME_held_out.npy``, for `streamgmm fit` and `score`.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from passes_bench import product as product_runs
from passes_bench.curves import plot
from passes_bench.datasets import MAKERS, DataSet, data_set, sorted_by_cluster
from passes_bench.engine import Engine
from passes_bench.methods import BASELINE, GRANULES, METHODS, SORTED_BASELINE, SORTED_METHODS, Method, order_effect
from passes_bench.tables import Run, first_passes, tables

BUDGET = 0.1


def run(data: DataSet, n_components: int, seed: int, covariance_type: str, name: str, method: Method) -> Run:
    """One line of the output."""
    engine = Engine.over(data, covariance_type, BUDGET, seed)
    begun = time.perf_counter()
    curve = [engine.likelihood(mixture) for mixture in method(engine, n_components, seed)]
    return {
        "data": data.name,
        "n": len(engine.rows),
        "d": engine.rows.shape[1],
        "k": n_components,
        "seed": seed,
        "covariance": covariance_type,
        "method": name,
        "passes": engine.passes,
        "bytes_read": engine.rows_read * engine.rows.shape[1] * 4,
        "seconds": round(time.perf_counter() - begun, 1),
        "curve": [round(value, 5) for value in curve],
    }


def write(data: DataSet, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{data.name}.npy", data.training)
    np.save(folder / f"{data.name}_held_out.npy", data.held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(MAKERS))
    parser.add_argument("-k", default="32,256,1024")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--product", action="store_true", help="run the package's own fit, not the prototype")
    parser.add_argument("--methods", default="", help="regular expression; the baseline always runs")
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--sorted", action="store_true")
    parser.add_argument("--device", default="auto", help="of --product")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/passes_data"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/bench_passes.jsonl"))
    parser.add_argument("--table", type=Path, help="only print tables of the runs in this file")
    parser.add_argument("--plot", type=Path, help="with --table: draw the curves too")
    parser.add_argument("--write", type=Path, help="only write the data sets into this folder")
    arguments = parser.parse_args()
    if arguments.write:
        for name in arguments.data.split(","):
            data = data_set(name, arguments.cache, arguments.rows)
            write(sorted_by_cluster(data) if arguments.sorted else data, arguments.write)
        return
    if arguments.table:
        runs = [json.loads(line) for line in arguments.table.read_text().splitlines()]
        baseline = SORTED_BASELINE if arguments.sorted else BASELINE
        if arguments.product:
            runs, baseline = [*runs, *first_passes(runs, product_runs.BASELINE)], product_runs.BASELINE
            baseline += ", as many passes" if arguments.sorted else ""
        print(tables(runs, baseline))
        if arguments.plot:
            plot(runs, baseline, arguments.plot)
        return
    torch.set_num_threads(1)
    done = set(_done(arguments.output))
    wanted = arguments.methods
    methods, baseline = (SORTED_METHODS, SORTED_BASELINE) if arguments.sorted else (METHODS, BASELINE)
    if arguments.product:
        methods, baseline, wanted = product_runs.WAYS, product_runs.BASELINE, wanted or product_runs.USUAL
    chosen = {name: methods[name] for name in methods if name == baseline or re.search(wanted, name)}
    asked = product(map(int, arguments.k.split(",")), map(int, arguments.seeds.split(",")), arguments.data.split(","))
    for k, seed, name in asked:
        missing = [m for m in chosen if (name, k, seed, arguments.covariance, m) not in done]
        if not missing:
            continue
        data = data_set(name, arguments.cache, arguments.rows)
        if arguments.sorted:
            data = sorted_by_cluster(data)
        if arguments.sorted and not arguments.product:
            engine = Engine.over(data, arguments.covariance, BUDGET, seed)
            print(name, "design effects by granules a step:", {g: order_effect(engine, g) for g in (0, *GRANULES)})
        for method in missing:
            if arguments.product:
                found = product_runs.run(data, k, seed, arguments.covariance, method, arguments.device)
            else:
                found = run(data, k, seed, arguments.covariance, method, chosen[method])
            line = json.dumps(found)
            with arguments.output.open("a") as file:
                print(line, file=file)
            print(line, flush=True)


def _done(path: Path) -> Iterator[tuple[object, ...]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        yield row["data"], row["k"], row["seed"], row["covariance"], row["method"]


if __name__ == "__main__":
    main()
