"""EM in few passes: held-out likelihood against passes and bytes read, on five data sets.

    python tools/bench_passes.py [--data patches,sift,text,heavy,imbalanced] [-k 32,256,1024] [--seeds 0,1,2]
                                 [--methods REGEX] [--covariance diag] [--sorted] [--device auto] [--output FILE]
    python tools/bench_passes.py --table FILE [--sorted] [--plot curves.png]
    python tools/bench_passes.py --write FOLDER [--data sift] [--sorted]

fits every set with the function behind `streamgmm fit`, and scores the model after every pass, as `score` does, on
10,000 rows held out: 30 full-batch passes, and five of stepwise EM. Each has a sample of a tenth of the rows in memory,
and every row read is counted, the sample's too. With ``--sorted`` the rows lie cluster by cluster, and the table's
baseline is full-batch EM after as many passes. ``--methods`` takes others of `passes_bench.product.WAYS` in the place
of stepwise EM.

One line of JSON a run, with its curve; a run that is in FILE already is not repeated. The data sets are made from what
ships with the packages installed, and kept in --cache. ``--write`` only leaves them in FOLDER as ``NAME.npy`` and
``NAME_held_out.npy``, for the commands themselves.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from passes_bench.curves import plot
from passes_bench.datasets import MAKERS, DataSet, data_set, sorted_by_cluster
from passes_bench.product import BASELINE, USUAL, WAYS, run
from passes_bench.records import note, noted
from passes_bench.tables import first_passes, tables


def write(data: DataSet, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{data.name}.npy", data.training)
    np.save(folder / f"{data.name}_held_out.npy", data.held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(MAKERS))
    parser.add_argument("-k", default="32,256,1024")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=USUAL, help="regular expression; the baseline always runs")
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--sorted", action="store_true")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/passes_data"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/bench_passes.jsonl"))
    parser.add_argument("--table", type=Path, help="only print tables of the runs in this file")
    parser.add_argument("--plot", type=Path, help="with --table: draw the curves too")
    parser.add_argument("--write", type=Path, help="only write the data sets into this folder")
    arguments = parser.parse_args()
    if arguments.table:
        runs = noted(arguments.table)
        early = first_passes(runs, BASELINE)
        print(tables([*runs, *early], early[0]["method"] if arguments.sorted else BASELINE))
        if arguments.plot:
            plot(runs, BASELINE, arguments.plot)
        return

    def made(name: str) -> DataSet:
        data = data_set(name, arguments.cache, arguments.rows)
        return sorted_by_cluster(data) if arguments.sorted else data

    names = arguments.data.split(",")
    if arguments.write:
        for name in names:
            write(made(name), arguments.write)
        return
    done = set(_done(arguments.output))
    methods = [method for method in WAYS if method == BASELINE or re.search(arguments.methods, method)]
    for k, seed, name in product(map(int, arguments.k.split(",")), map(int, arguments.seeds.split(",")), names):
        missing = [method for method in methods if (name, k, seed, arguments.covariance, method) not in done]
        data = made(name) if missing else None
        for method in missing:
            note(arguments.output, run(data, k, seed, arguments.covariance, method, arguments.device))


def _done(path: Path) -> Iterator[tuple[object, ...]]:
    for row in noted(path) if path.exists() else ():
        yield row["data"], row["k"], row["seed"], row["covariance"], row["method"]


if __name__ == "__main__":
    main()
