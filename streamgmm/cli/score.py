"""``streamgmm score``."""

from __future__ import annotations

import click

from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.inference import mean_log_likelihood
from streamgmm.io.sources import open_source
from streamgmm.mixture import Mixture


@click.command(epilog="Example: streamgmm score run held-out.zarr --json")
@click.argument("run")
@click.argument("data", nargs=-1, required=True)
@add_computing
@as_json
def score(
    run: str,
    data: tuple[str, ...],
    computing: Computing,
    as_json: bool,
) -> None:
    """Mean log-likelihood of DATA under the model in RUN (or a model file), nats a row."""
    mixture = Mixture.load(run)
    source = open_source(one_path(data))
    value = mean_log_likelihood(source, mixture, computing.inference())
    facts = {"lower_bound": value, "n_samples": source.shape[0], "digest": mixture.digest}
    print_result(facts, [f"{value:.6f} nats a row over {source.shape[0]:,} rows"], as_json=as_json)
