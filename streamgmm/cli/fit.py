"""``streamgmm fit``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.errors import RequestError
from streamgmm.fitting import FitResult
from streamgmm.fitting import fit as fit_source
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources import open_source
from streamgmm.mixture import COVARIANCE_TYPES
from streamgmm.progress import TerminalProgress
from streamgmm.request import FitRequest
from streamgmm.seeding import INIT_METHODS, Start, check_finite
from streamgmm.units import format_bytes


@click.command(
    epilog="Example: streamgmm fit vectors.zarr -k 1024 --output run --memory 4GiB. "
    "Killed? The same command goes on where it stopped."
)
@click.argument("data", nargs=-1, required=True)
@click.option("-k", "--components", type=int, required=True, help="Number of components.")
@click.option("--covariance", type=click.Choice(COVARIANCE_TYPES), default="diag", show_default=True)
@click.option("--output", metavar="RUN", type=click.Path(path_type=Path), help="Folder to save in and resume from.")
@click.option("--max-iter", type=click.IntRange(0), default=100, show_default=True, help="Parameter updates.")
@click.option("--max-passes", type=float, default=float("inf"), help="Sweeps over the data, sampling counted.")
@click.option("--tol", type=float, default=1e-3, show_default=True, help="Nats a sample.")
@click.option("--reg-covar", type=float, default=1e-6, show_default=True, help="Added to every variance.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--n-init", type=click.IntRange(1), default=1, show_default=True, help="Starts that share each pass.")
@click.option(
    "--init",
    default="kmeans",
    show_default=True,
    metavar="METHOD",
    help=f"{', '.join(INIT_METHODS)}, or an .npy file of means (K, D).",
)
@click.option("--checkpoint-every", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds.")
@click.option("--fresh", is_flag=True, help="Move a run that is in RUN aside and start over.")
@add_computing
@as_json
def fit(
    data: tuple[str, ...],
    components: int,
    covariance: str,
    output: Path | None,
    max_iter: int,
    max_passes: float,
    tol: float,
    reg_covar: float,
    seed: int,
    n_init: int,
    init: str,
    checkpoint_every: float,
    fresh: bool,
    computing: Computing,
    as_json: bool,
) -> None:
    """Fit a mixture to DATA: .npy, .fbin/.u8bin/.i8bin, or Zarr; several paths make one data set.

    With --output the run is checkpointed, and the same command resumes it.
    """
    source = open_source(one_path(data))
    method, start = _start(init, (components, source.shape[1]))
    request = FitRequest(
        n_components=components,
        covariance_type=covariance,
        tol=tol,
        reg_covar=reg_covar,
        max_iter=max_iter,
        max_passes=max_passes,
        n_init=n_init,
        init=method,
        start=start,
        seed=seed,
        precision=computing.precision,
        device=computing.device,
        memory_limit=computing.memory_limit,
        chunk_rows=computing.chunk_rows,
        threads=computing.threads,
        checkpoint_every=checkpoint_every,
    )
    if output is None and not as_json:
        click.echo("no --output was named: the result is printed, and nothing is saved")
    with TerminalProgress(quiet=as_json) as progress:
        result = fit_source(source, request, output, progress, fresh=fresh)
    print_result(result.summary(), summary_lines(result, output), as_json=as_json)


def _start(init: str, shape: tuple[int, int]) -> tuple[str, Start]:
    """``--init`` as a method and given parameters."""
    if not init.endswith(".npy"):
        return init, Start()
    means = open_source(init)
    if means.shape != shape:
        raise RequestError(f"{init}: --init needs means of shape (components, features) {shape}; got {means.shape}")
    rows = values(means.read(0, shape[0]))
    check_finite(means, rows, np.arange(shape[0]))
    return "kmeans", Start(means=rows.astype(np.float64))


def summary_lines(result: FitResult, output: Path | None) -> list[str]:
    """What a person wants to know after a fit."""
    mixture = result.mixture
    lines = [f"{output} is finished already:"] if result.plan is None else []
    rate = result.bytes_streamed / max(result.seconds, 1e-9) / 1e9
    waiting = result.seconds_waiting / max(result.seconds, 1e-9)
    bounds = result.lower_bounds
    lines += [
        f"rows             {result.n_samples:,} × {mixture.n_features}",
        f"components       {mixture.n_components} {mixture.covariance_type}",
        f"passes           {result.n_passes:.2f} ({result.n_iter} iterations, "
        f"{'converged' if result.converged else 'not converged'})",
        f"time             {result.seconds:.1f} s, {rate:.2f} GB/s",
        f"bottleneck       {'reading the data' if waiting > 0.5 else 'computing'} "
        f"({waiting:.0%} of the time was spent waiting for data)",
        f"peak memory      {format_bytes(result.peak_host_bytes)} host, "
        f"{format_bytes(result.peak_device_bytes)} device",
    ]
    if bounds:
        lines.append(f"log-likelihood   {bounds[0]:.4f} before, {bounds[-1]:.4f} after (nats a row)")
    lines.append(f"digest           {mixture.digest}")
    if output is not None:
        lines.append(f"saved in         {output}")
    return lines
