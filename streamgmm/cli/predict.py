"""``streamgmm predict``."""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.cli.streaming import counted, fitted_rows, model_of, rows_option, spare
from streamgmm.errors import RequestError
from streamgmm.inference import Posterior, posteriors, responsibilities
from streamgmm.io.sinks import Behind, open_sink
from streamgmm.mixture import Mixture

LABELS, RESP = np.dtype(np.int32), np.dtype(np.float32)


@click.command(epilog="Example: streamgmm predict run vectors.zarr labels.npy --top 4 --proba")
@click.argument("run", type=click.Path())
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(1), help="The M most responsible components of each row, best first.")
@click.option("--proba", is_flag=True, help="Write responsibilities too; without --top, all K of them.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@rows_option
@add_computing
@as_json
def predict(
    run: str,
    data: tuple[str, ...],
    out: Path,
    top: int | None,
    proba: bool,
    overwrite: bool,
    rows: str,
    computing: Computing,
    as_json: bool,
) -> None:
    """Write the most responsible component of each row of DATA to OUT (.npy or .zarr), in bounded memory.

    OUT holds int32 labels, (N,), or (N, M) with --top M. --proba alone writes float32 responsibilities (N, K) instead;
    with --top M it writes labels to OUT and their responsibilities, (N, M), beside it, as NAME.resp.npy.

    Where RUN was fitted on rows that `prepare` made, raw vectors are prepared alike on their way.
    """
    begun = time.perf_counter()
    mixture = model_of(run)
    source = fitted_rows(run, one_path(data), rows, computing.cache)
    if overwrite:
        spare(data, out)
    settings = computing.inference()
    n = source.shape[0]
    written = [str(out)]
    if proba and top is None:
        with Behind(open_sink(out, (n, mixture.n_components), RESP, overwrite=overwrite)) as sink:
            for resp in counted(responsibilities(source, mixture, settings), n, len, quiet=as_json):
                sink.write(resp)
    elif proba and top is not None:
        beside = out.with_suffix(f".resp{out.suffix}")
        _check_top(top, mixture)
        with (
            Behind(open_sink(out, (n, top), LABELS, overwrite=overwrite)) as label_sink,
            Behind(open_sink(beside, (n, top), RESP, overwrite=overwrite)) as resp_sink,
        ):
            for chunk in counted(posteriors(source, mixture, top, settings), n, _rows, quiet=as_json):
                label_sink.write(chunk.labels)
                resp_sink.write(chunk.resp)
        written.append(str(beside))
    else:
        _check_top(top or 1, mixture)
        shape = (n,) if top is None else (n, top)
        with Behind(open_sink(out, shape, LABELS, overwrite=overwrite)) as sink:
            for chunk in counted(posteriors(source, mixture, top or 1, settings), n, _rows, quiet=as_json):
                sink.write(chunk.labels[:, 0] if top is None else chunk.labels)
    facts = {"n_samples": n, "written": written, "seconds": time.perf_counter() - begun, "digest": mixture.digest}
    print_result(facts, [f"{n:,} rows: {' and '.join(written)}"], as_json=as_json)


def _rows(chunk: Posterior) -> int:
    return len(chunk.labels)


def _check_top(top: int, mixture: Mixture) -> None:
    if top > mixture.n_components:
        raise RequestError(f"--top is {top} and the model has {mixture.n_components} components; ask for at most those")
