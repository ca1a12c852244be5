"""``streamgmm fit``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.errors import RequestError
from streamgmm.fitting import assist
from streamgmm.fitting import fit as fit_source
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources import Source, open_source
from streamgmm.mixture import COVARIANCE_TYPES
from streamgmm.processes import join_world, launched
from streamgmm.progress import TerminalProgress
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult, comparison
from streamgmm.seeding import INIT_METHODS, STREAMED, Start, check_finite
from streamgmm.steps.collapse import POLICIES
from streamgmm.units import format_bytes
from streamgmm.weighting import open_weights


class Sizes(click.ParamType[tuple[int, ...]]):
    """``64`` or ``64,128,256``."""

    name = "sizes"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no number, nor several with commas between, such as 64,128,256", param, context)


@click.command(
    epilog="Example: streamgmm fit vectors.zarr -k 1024 --output run --memory 4GiB. "
    "Killed? The same command goes on where it stopped."
)
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.option(
    "-k", "--components", type=Sizes(), required=True, metavar="K[,K…]", help="Components; several share each pass."
)
@click.option("--covariance", type=click.Choice(COVARIANCE_TYPES), help="[default: diag; spherical for kmeans]")
@click.option("--model", type=click.Choice(["gmm", "kmeans"]), default="gmm", show_default=True)
@click.option("--output", metavar="RUN", type=click.Path(path_type=Path), help="Folder to save in and resume from.")
@click.option(
    "--algorithm",
    type=click.Choice(["em", "stepwise", "auto"]),
    default="em",
    show_default=True,
    help="stepwise updates 50 times a pass and ends after 5; auto chooses and says why.",
)
@click.option(
    "--max-iter", type=click.IntRange(0), default=100, show_default=True, help="Updates; a stepwise pass counts as one."
)
@click.option(
    "--max-passes",
    type=float,
    default=float("inf"),
    help="Sweeps over the data, sampling counted.  [default: 5 for stepwise, else no limit]",
)
@click.option("--tol", type=float, help="[default: 1e-3 nats a row; for kmeans 1e-4, as scikit-learn's]")
@click.option("--reg-covar", type=float, default=1e-6, show_default=True, help="Added to every variance.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--n-init", type=click.IntRange(1), default=1, show_default=True, help="Starts that share each pass.")
@click.option(
    "--init",
    default="kmeans",
    show_default=True,
    metavar="METHOD",
    help=f"{', '.join(INIT_METHODS)}; {STREAMED}, three passes over every row; or an .npy file of means (K, D).",
)
@click.option(
    "--accelerate",
    type=click.Choice(["none", "squarem"]),
    default="none",
    show_default=True,
    help="Extrapolate every second full-batch update; harm is undone.",
)
@click.option(
    "--sample-rows",
    type=click.IntRange(1),
    help="Rows of the sample that pass 0 keeps in memory.  [default: by N, D and K, mostly 32768]",
)
@click.option("--weights", metavar="FILE", help="Sample weights, an .npy file of N numbers.")
@click.option("--holdout", type=float, default=0.0, metavar="F", help="Fraction of the rows to score instead of fit.")
@click.option(
    "--criterion",
    type=click.Choice(["auto", "bic", "aic", "held_out"]),
    default="auto",
    show_default=True,
    help="Which of several K is the best; auto is held_out with --holdout, else bic.",
)
@click.option("--nonfinite", type=click.Choice(["raise", "skip"]), default="raise", show_default=True)
@click.option(
    "--collapse",
    type=click.Choice(POLICIES),
    default="floor",
    show_default=True,
    help="What to do about components that own no row.",
)
@click.option("--split-to", type=int, metavar="K", help="Grow to K by splitting the heaviest at each convergence.")
@click.option("--checkpoint-every", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds.")
@click.option(
    "--recheck/--no-recheck",
    default=True,
    show_default=True,
    help="Compare rows read in later passes with the first; costs time only where reading does not limit.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Fit on the workers of this Dask scheduler (tcp://host:8786).")
@click.option("--fresh", is_flag=True, help="Move a run that is in RUN aside and start over.")
@add_computing
@as_json
def fit(
    data: tuple[str, ...],
    components: tuple[int, ...],
    covariance: str | None,
    model: str,
    output: Path | None,
    algorithm: str,
    max_iter: int,
    max_passes: float,
    tol: float | None,
    reg_covar: float,
    seed: int,
    n_init: int,
    init: str,
    accelerate: str,
    sample_rows: int | None,
    weights: str | None,
    holdout: float,
    criterion: str,
    nonfinite: str,
    collapse: str,
    split_to: int | None,
    checkpoint_every: float,
    recheck: bool,
    scheduler: str | None,
    fresh: bool,
    computing: Computing,
    as_json: bool,
) -> None:
    """Fit a mixture to DATA: .npy, .fbin/.u8bin/.i8bin, or Zarr; several paths make one data set.

    With --output the run is checkpointed, and the same command resumes it.
    """
    with join_world() as world:
        source = open_source(one_path(data), computing.cache)
        hard = model == "kmeans"
        method, start = _start(init, components, source.shape[1])
        request = FitRequest(
            n_components=components,
            model=model,
            covariance_type=covariance or ("spherical" if hard else "diag"),
            tol=tol if tol is not None else 1e-4 if hard else 1e-3,
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
            host_memory=computing.host_memory,
            chunk_rows=computing.chunk_rows,
            threads=computing.threads,
            checkpoint_every=checkpoint_every,
            recheck=recheck,
            weights=None if weights is None else open_weights(weights, source.shape[0]),
            holdout=holdout,
            criterion=criterion,
            nonfinite=nonfinite,
            collapse=collapse,
            split_to=split_to,
            algorithm=algorithm,
            sample_rows=sample_rows,
            accelerate=accelerate,
        )
        if output is None and not as_json and world.leads:
            click.echo("no --output was named: the result is printed, and nothing is saved")
        with TerminalProgress(quiet=as_json or not world.leads, processes=world.size) as progress:
            if not world.leads:
                assist(source, request, progress, world=world)
                return
            if scheduler is None:
                result = fit_source(source, request, output, progress, fresh=fresh, world=world)
            else:
                result = _on_cluster(scheduler, source, request, output, progress, fresh=fresh)
    print_result(result.summary(), summary_lines(result, output), as_json=as_json)


def _on_cluster(
    scheduler: str, source: Source, request: FitRequest, output: Path | None, progress: Progress, *, fresh: bool
) -> FitResult:
    if launched()[1] > 1:
        raise RequestError(f"--scheduler {scheduler}: its workers are the processes; start one fit, not under torchrun")
    # distributed takes a second to import; no other fit needs it.
    from streamgmm.cluster.fitting import fit_on

    return fit_on(scheduler, source, request, output, progress, fresh=fresh)


def _start(init: str, components: tuple[int, ...], n_features: int) -> tuple[str, Start]:
    """``--init`` as a method and given parameters."""
    if not init.endswith(".npy"):
        return init, Start()
    if len(components) > 1:
        raise RequestError(f"{init}: --init with means needs a single -k; got {','.join(map(str, components))}")
    shape = (components[0], n_features)
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
    if result.plan is None and not result.converged:
        lines[0] = f"{output} is finished already, not converged (a larger --max-iter goes on):"
    rate = result.bytes_streamed / max(result.seconds, 1e-9) / 1e9
    waiting = result.seconds_waiting / max(result.seconds, 1e-9)
    kept = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in result.hit_rates.items() if share)
    together = f" by {result.n_processes} processes" if result.n_processes > 1 else ""
    bounds = result.lower_bounds
    lines += [
        f"rows             {result.n_samples:,} × {mixture.n_features}",
        f"components       {mixture.n_components} {'k-means' if result.model.hard else mixture.covariance_type}",
        f"passes           {result.n_passes:.2f} ({result.n_iter} iterations, "
        f"{'converged' if result.converged else 'not converged'})",
        f"time             {result.seconds:.1f} s, {rate:.2f} GB/s{together}",
        f"bottleneck       {result.bottleneck or 'none'} ({waiting:.0%} of the time was spent waiting for data"
        f"{kept and f'; rows came from {kept}'})",
        f"peak memory      {format_bytes(result.peak_host_bytes)} host, "
        f"{format_bytes(result.peak_device_bytes)} device",
    ]
    if result.why:
        lines.append(f"algorithm        {result.why}")
    if result.skipped:
        lines.append(f"skipped          {result.skipped:,} rows that are not finite")
    if result.model.inertia is not None:
        lines.append(f"inertia          {result.model.inertia:.6g}")
    elif bounds:
        lines.append(f"log-likelihood   {bounds[0]:.4f} before, {bounds[-1]:.4f} after (nats a row)")
    if len(result.models) > 1:
        lines += ["", *comparison(result.models, result.best), ""]
    elif result.model.held_out is not None:
        lines.append(f"held out         {result.model.held_out:.4f} nats a row")
    lines.append(f"digest           {mixture.digest}")
    if output is not None:
        lines.append(f"saved in         {output}")
    return lines
