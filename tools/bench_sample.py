"""Is all of the data worth it? Models of every row against models of a sample that fits in memory.

    python tools/bench_sample.py [--data sift,patches,text] [-k 32,256,1024] [--rows 200000] [--shares 0.01,0.1]
                                 [--seed 0] [--output FILE]
    python tools/bench_sample.py --table FILE

Each line of JSON is one set and size: the mean log-likelihood of rows held out, and the distances computed a query for
recall@10 of 0.95 by an inverted file (centroids included; lists of nearest vectors, 2,000 queries from the rows held
out). Mixtures (``diag``) are the better of two fits to the sample, 30 iterations from k-means and `stepwise`, and
five passes of `stepwise` over all rows; centroids are k-means' with at most 25 passes, over the sample or all rows.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from passes_bench.datasets import MAKERS, DataSet, data_set
from passes_bench.product import REG_COVAR
from passes_bench.records import note, noted

from streamgmm.ann.evaluation import TOP1
from streamgmm.ann.ground_truth import exact_neighbours
from streamgmm.ann.layout import lay_out
from streamgmm.ann.training import train_quantizer
from streamgmm.ann.ways import Asked, Ways
from streamgmm.fitting import fit
from streamgmm.inference import InferenceSettings, mean_log_likelihood
from streamgmm.io.sources.array import ArraySource
from streamgmm.mixture import n_parameters
from streamgmm.request import FitRequest
from streamgmm.seeding import uniform_rows

RECALL = 0.95
QUERIES = 2000
EXACT = InferenceSettings(torch.device("cpu"), "high")

Run = dict[str, object]


def likelihood(data: DataSet, rows: np.ndarray, k: int, seed: int, algorithm: str) -> float:
    """Of the rows held out, nats a row."""
    iterations = 30 if algorithm == "em" else 100
    asked = FitRequest(k, "diag", tol=0.0, reg_covar=REG_COVAR, max_iter=iterations, algorithm=algorithm, seed=seed)
    return mean_log_likelihood(ArraySource(data.held_out), fit(ArraySource(rows), asked).mixture, EXACT)


def distances(data: DataSet, truth: np.ndarray, lists: int, seed: int, sample: int | None) -> float:
    """Computed a query, at the recall."""
    source = ArraySource(data.training)
    layout = lay_out(source, train_quantizer(source, lists, sample=sample, seed=seed, settings=EXACT), [TOP1], EXACT)
    asked = Asked(data.held_out[:QUERIES], truth)
    return Ways(layout, (asked, asked), RECALL).plain_cost(layout.tables[0], RECALL)


def run(data: DataSet, k: int, seed: int, shares: list[float]) -> Run:
    """One line of the output."""
    n, d = data.training.shape
    truth = exact_neighbours(ArraySource(data.training), data.held_out[:QUERIES], 10, EXACT)
    found: Run = {"data": data.name, "n": n, "d": d, "k": k, "parameters": n_parameters("diag", k, d), "seed": seed}
    for share in (*shares, 1.0):
        rows = data.training[uniform_rows(n, int(share * n), np.random.default_rng([seed, 7]))]
        ways = ("stepwise",) if share == 1 else ("em", "stepwise")
        fitted = max(likelihood(data, rows, k, seed, way) for way in ways) if len(rows) >= 2 * k else None
        computed = distances(data, truth, k, seed, None if share == 1 else len(rows)) if len(rows) >= 2 * k else None
        found[f"{share:g}"] = {"rows": len(rows), "log_likelihood": fitted, "distances": computed}
    return found


def table(runs: list[Run]) -> str:
    """Markdown: what the sample lacks in nats, and how many more distances its centroids cost."""
    shares = [name for name in runs[0] if name[0].isdigit() and name != "1"]
    heads = [f"{float(share):.0%}: {what}" for share in shares for what in ("rows a parameter", "nats", "distances")]
    columns = ["data", "N", "D", "K", *heads, "all: nats", "all: distances"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for found in runs:
        cells = [str(found[name]) for name in ("data", "n", "d", "k")]
        whole = found["1"]
        for share in shares:
            part = found[share]
            cells.append(f"{part['rows'] / found['parameters']:.2g}")  # type: ignore[index, operator]
            for name, form in (("log_likelihood", "{:+.3f}"), ("distances", "{:+.1%}")):
                mine, theirs = part[name], whole[name]  # type: ignore[index]
                gap = None if mine is None else mine - theirs if name == "log_likelihood" else mine / theirs - 1
                cells.append("–" if gap is None else form.format(gap))
        cells += [f"{whole['log_likelihood']:.3f}", f"{whole['distances']:.0f}"]  # type: ignore[index]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sift,patches,text", help=f"of {', '.join(MAKERS)}")
    parser.add_argument("-k", default="32,256,1024")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shares", default="0.01,0.1", help="of the rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/passes_data"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/bench_sample.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of the runs in this file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(noted(arguments.table)))
        return
    shares = [float(share) for share in arguments.shares.split(",")]
    for k, name in product(map(int, arguments.k.split(",")), arguments.data.split(",")):
        data = data_set(name, arguments.cache, arguments.rows)
        note(arguments.output, run(data, k, arguments.seed, shares))


if __name__ == "__main__":
    main()
