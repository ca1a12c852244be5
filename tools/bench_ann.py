"""The tables of docs/ann.md: distance computations at a given recall, on vectors made from what packages ship.

    python tools/bench_ann.py sift patches text --rows 200000 --lists 512 --output ann-results

makes the sets (minutes, once), trains a spherical mixture and three k-means on each, and writes NAME.json, NAME.txt and
NAME.svg. ``--training`` compares ways of training the quantizer instead.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ann_bench.datasets import MAKERS, Vectors, vectors
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture, Mixture
from streamgmm.ann.evaluation import EvaluationRequest, evaluate
from streamgmm.ann.plot import draw
from streamgmm.ann.quantizer import tempered
from streamgmm.ann.training import train_quantizer


def models(made: Vectors, lists: int, covariance: str, folder: Path) -> dict[str, Any]:
    """The mixture, as the paper trains one."""
    return {f"{covariance} mixture": mixture(made, lists, covariance, folder)}


def ways_of_training(made: Vectors, lists: int, covariance: str, folder: Path) -> dict[str, Any]:
    """Quantizers for the same purpose, trained otherwise."""
    rows = made.rows
    trained = {
        "k-means, 64 rows a list": train_quantizer(rows, lists, sample=64 * lists),
        "k-means, 256 rows a list": train_quantizer(rows, lists, sample=256 * lists),
        **{f"k-means, balance {b:g}": train_quantizer(rows, lists, balance=b) for b in (0.1, 0.2, 0.4)},
    }
    fitted = mixture(made, lists, covariance, folder)
    return trained | {f"{covariance} mixture, T = {t:g}": tempered(fitted, t) for t in (0.5, 1.0, 2.0, 8.0)}


def mixture(made: Vectors, lists: int, covariance: str, folder: Path) -> Mixture:
    """Fitted once and kept beside the data."""
    path = folder / f"{made.name}-{len(made.rows)}-{covariance}-{lists}.safetensors"
    if not path.exists():
        gm = GaussianMixture(lists, covariance_type=covariance, random_state=0, max_iter=15, tol=0)
        with warnings.catch_warnings():
            # Fifteen iterations are what is asked for.
            warnings.simplefilter("ignore", ConvergenceWarning)
            gm.fit(made.rows)
        gm.mixture_.save(path)
    return Mixture.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=sorted(MAKERS))
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--lists", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=15, help="Of k-means, at most.")
    parser.add_argument("--covariance", default="spherical")
    parser.add_argument("--training", action="store_true", help="Compare ways of training the quantizer.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("ann-data"))
    parser.add_argument("--output", type=Path, default=Path("ann-results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    seeds = 1 if arguments.training else arguments.seeds
    for name in arguments.sets:
        made = vectors(name, arguments.data, arguments.rows, arguments.queries)
        others = (ways_of_training if arguments.training else models)(
            made, arguments.lists, arguments.covariance, arguments.data
        )
        request = EvaluationRequest(seeds=range(seeds), iterations=arguments.iterations)
        found = evaluate(made.rows, made.queries, others, request, n_lists=arguments.lists, told=_clock(name))
        stem = arguments.output / (f"{name}-training" if arguments.training else name)
        text = "\n".join(found.lines())
        stem.with_suffix(".json").write_text(json.dumps(found.facts(), indent=1) + "\n")
        stem.with_suffix(".txt").write_text(text + "\n")
        draw(found, stem.with_suffix(".svg"))
        print(text, flush=True)


def _clock(name: str) -> Callable[[str], None]:
    begun = time.perf_counter()
    return lambda line: print(f"{name} {time.perf_counter() - begun:6.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
