"""``streamgmm score``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from math import fsum, log
from pathlib import Path

import click
import numpy as np

from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.cli.streaming import counted, fitted_rows, in_blocks, model_of, rows_option, spare
from streamgmm.estimator.quantiles import quantile as exact_quantile
from streamgmm.exact import exact_sum
from streamgmm.inference import log_likelihoods
from streamgmm.io.sinks import Behind, open_sink
from streamgmm.mixture import Float64Array
from streamgmm.statistics import BLOCK_ROWS

SCORES = np.dtype(np.float64)


@click.command(
    epilog="Example: streamgmm score run held-out.zarr --json. "
    "Outliers: streamgmm score run vectors.zarr --quantile 0.01 --per-row scores.npy"
)
@click.argument("run", type=click.Path())
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.option(
    "--per-row", metavar="OUT", type=click.Path(path_type=Path), help="Write each row's score (.npy or .zarr)."
)
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1),
    metavar="Q",
    help="Print the score below which a share Q of the rows lies: a threshold for outliers.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@rows_option
@add_computing
@as_json
def score(
    run: str,
    data: tuple[str, ...],
    per_row: Path | None,
    quantile: float | None,
    overwrite: bool,
    rows: str,
    computing: Computing,
    as_json: bool,
) -> None:
    """Mean log-likelihood of DATA under the model in RUN (or a model file), nats a row; and BIC and AIC.

    --per-row writes log p(x) of every row, float64. --quantile is exact, in bounded memory: more than a million scores
    are kept in a temporary file, eight bytes a row.
    """
    begun = time.perf_counter()
    mixture = model_of(run)
    source = fitted_rows(run, one_path(data), rows, computing.cache)
    if per_row is not None and overwrite:
        spare(data, per_row)
    settings = computing.inference()
    n = source.shape[0]
    sums: list[float] = []
    extremes: list[float] = []
    with nullcontext() if per_row is None else Behind(open_sink(per_row, (n,), SCORES, overwrite=overwrite)) as sink:

        def seen() -> Iterator[Float64Array]:
            chunks = counted(log_likelihoods(source, mixture, settings), n, len, quiet=as_json)
            # Blocks of fixed rows: the sum of their sums does not depend on the chunks.
            for block in in_blocks(chunks, BLOCK_ROWS):
                sums.append(exact_sum([block]))
                extremes[:] = [min([*extremes[:1], float(block.min())]), max([*extremes[1:], float(block.max())])]
                if sink is not None:
                    sink.write(block)
                yield block

        if quantile is None:
            threshold = None
            for _ in seen():
                pass
        else:
            threshold = exact_quantile(seen(), n, quantile)
    mean = fsum(sums) / n
    facts = {
        "lower_bound": mean,
        "n_samples": n,
        "min": extremes[0],
        "max": extremes[1],
        "bic": mixture.n_parameters * log(n) - 2 * fsum(sums),
        "aic": 2 * mixture.n_parameters - 2 * fsum(sums),
        "quantile": quantile,
        "threshold": threshold,
        "written": None if per_row is None else str(per_row),
        "seconds": time.perf_counter() - begun,
        "digest": mixture.digest,
    }
    lines = [
        f"{mean:.6f} nats a row over {n:,} rows, from {extremes[0]:.4f} to {extremes[1]:.4f}",
        f"BIC {facts['bic']:.6g}, AIC {facts['aic']:.6g} ({mixture.n_parameters:,} parameters)",
    ]
    if quantile is not None:
        lines.append(f"threshold {threshold:.6f}: {quantile:.4%} of the rows score less")
    if per_row is not None:
        lines.append(f"each row's score: {per_row}")
    print_result(facts, lines, as_json=as_json)
