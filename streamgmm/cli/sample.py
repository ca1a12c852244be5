"""``streamgmm sample``."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import torch

from streamgmm.cli.options import as_json, print_result
from streamgmm.cli.streaming import counted, model_of
from streamgmm.device import compute_workers
from streamgmm.errors import RequestError
from streamgmm.io.sinks import open_sink
from streamgmm.mixture import Float64Array
from streamgmm.sampling import draw
from streamgmm.units import format_bytes

LABELS = np.dtype(np.int32)
DTYPES = ("float64", "float32", "float16")


@click.command(epilog="Example: streamgmm sample run 1000000 synthetic.npy --seed 1 --labels components.npy")
@click.argument("run", type=click.Path())
@click.argument("n", type=click.IntRange(1))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option(
    "--labels", metavar="FILE", type=click.Path(path_type=Path), help="Where to write each row's component, int32."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT and the labels if they exist.")
@as_json
def sample(
    run: str, n: int, out: Path, seed: int, dtype: str, labels: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Draw N rows from the model in RUN (or a model file) to OUT (.npy or .zarr), in bounded memory.

    Rows are independent of one another: their components come in random order. The same seed gives the same rows.
    """
    begun = time.perf_counter()
    if labels is not None and labels.resolve() == out.resolve():
        raise RequestError(f"--labels is {labels}, where the rows go; name another file")
    mixture = model_of(run)
    kind = np.dtype(dtype)
    with ExitStack() as stack:
        rows_sink = stack.enter_context(open_sink(out, (n, mixture.n_features), kind, overwrite=overwrite))
        label_sink = stack.enter_context(open_sink(labels, (n,), LABELS, overwrite=overwrite)) if labels else None
        pieces = draw(mixture, n, seed, compute_workers(torch.device("cpu")))
        for rows, components in counted(pieces, n, lambda piece: len(piece[0]), quiet=as_json):
            rows_sink.write(_stored(rows, kind))
            if label_sink is not None:
                label_sink.write(components)
    written = [str(path) for path in (out, labels) if path is not None]
    size = n * mixture.n_features * kind.itemsize
    facts = {
        "n_samples": n,
        "n_features": mixture.n_features,
        "dtype": dtype,
        "seed": seed,
        "bytes": size,
        "written": written,
        "seconds": time.perf_counter() - begun,
        "digest": mixture.digest,
    }
    lines = [f"{n:,} rows × {mixture.n_features} {dtype} ({format_bytes(size)}): {' and '.join(written)}"]
    print_result(facts, lines, as_json=as_json)


def _stored(rows: Float64Array, dtype: np.dtype[np.generic]) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = rows.astype(dtype)
    if not np.isfinite(stored).all():
        largest = np.abs(rows).max()
        raise RequestError(f"--dtype {dtype.name} cannot hold the value {largest:.3g} that was drawn; use a wider one")
    return stored
