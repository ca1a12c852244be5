"""``streamgmm evaluate``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import numpy as np

from streamgmm.ann.evaluation import RECALLS, EvaluationRequest
from streamgmm.ann.evaluation import evaluate as evaluate_source
from streamgmm.ann.ground_truth import read_truth
from streamgmm.ann.plot import check_picture, draw
from streamgmm.ann.quantizer import quantizer_of
from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.cli.streaming import fitted_rows, rows_option, spare
from streamgmm.errors import RequestError
from streamgmm.io.bfloat16 import values


@click.command(
    epilog="Example: streamgmm evaluate run base.fvecs query.fvecs --truth groundtruth.ivecs --plot recall.svg. "
    "ann-benchmarks: streamgmm evaluate run glove.hdf5::train glove.hdf5::test --truth glove.hdf5::neighbors"
)
@click.argument("run", type=click.Path())
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.argument("queries", type=click.Path())
@click.option("--truth", metavar="FILE", help="True neighbours: .ivecs, .bin, .ibin, .npy, HDF5; else computed.")
@click.option("-k", "--neighbours", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="k-means of the baselines.")
@click.option("--tuning", type=float, default=0.3, show_default=True, help="Share of the queries to tune on.")
@click.option("--iterations", type=click.IntRange(1), default=25, show_default=True, help="Of k-means, at most.")
@click.option("--speed/--no-speed", default=True, help="Measure faiss's queries per second, where it is installed.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Picture, .svg, .png or .pdf.")
@rows_option
@add_computing
@as_json
def evaluate(
    run: str,
    data: tuple[str, ...],
    queries: str,
    truth: str | None,
    neighbours: int,
    seeds: int,
    tuning: float,
    iterations: int,
    speed: bool,
    plot: Path | None,
    rows: str,
    computing: Computing,
    as_json: bool,
) -> None:
    """Recall against distance computations, for lists of DATA under the model in RUN and under k-means of as many.

    A cost counts one distance to each centroid and one to each vector that is looked at, once however many lists hold
    it. "odds" stops each query where the odds of finding more are low, as learnt from the tuning queries. The brackets
    are 95 % bootstrap intervals over queries and seeds.
    """
    begun = time.perf_counter()
    quantizer = quantizer_of(run)
    source, asked = fitted_rows(run, one_path(data), rows, computing.cache), fitted_rows(run, queries, rows)
    if plot is not None:
        spare((*data, queries), plot)
        check_picture(plot)
    if asked.shape[1] != source.shape[1]:
        raise RequestError(
            f"{queries} has {asked.shape[1]} features and the data {source.shape[1]}; give matching files"
        )
    known = None if truth is None else read_truth(truth, asked.shape[0], source.shape[0], neighbours)
    request = EvaluationRequest(neighbours, RECALLS, range(seeds), tuning, iterations, speed)

    def told(line: str) -> None:
        if not as_json and sys.stderr.isatty():
            click.echo(f"{time.perf_counter() - begun:6.0f} s  {line}", err=True)

    found = evaluate_source(
        source,
        np.asarray(values(asked.read(0, asked.shape[0])), np.float32),
        quantizer,
        request,
        truth=known,
        settings=computing.inference(),
        told=told,
    )
    if plot is not None:
        draw(found, plot)
    facts = {**found.facts(), "seconds": time.perf_counter() - begun, "digest": quantizer.digest}
    print_result(facts, found.lines(), as_json=as_json)
