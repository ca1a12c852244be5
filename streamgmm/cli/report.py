"""``streamgmm report``."""

from __future__ import annotations

from pathlib import Path

import click

from streamgmm.cli.options import as_json, print_result, warn
from streamgmm.report import read_run, write_report
from streamgmm.units import format_bytes


@click.command(epilog="Example: streamgmm report run --output run.html")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path), help="Where to; report.html in RUN if it is not given."
)
@as_json
def report(run: Path, output: Path | None, as_json: bool) -> None:
    """Write one HTML page about RUN, finished or not, or about a model file.

    Convergence, weights, condition numbers, a projection of the components, throughput, settings, and which components
    failed. The page needs no network, and a report that is there already is replaced.
    """
    record = read_run(run, warn)
    path = output or (run / "report.html" if run.is_dir() else run.with_suffix(".html"))
    size = write_report(record, path)
    facts = {
        "written": str(path),
        "bytes": size,
        "state": "finished" if record.finished else "unfinished",
        "n_components": record.mixture.n_components,
        "n_iter": len(record.best_history),
        "digest": record.mixture.digest,
    }
    print_result(facts, [f"{path} ({format_bytes(size)})"], as_json=as_json)
