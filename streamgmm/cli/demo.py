"""``streamgmm demo``."""

from __future__ import annotations

from pathlib import Path

import click

from streamgmm import demo as demonstration
from streamgmm.cli.fit import summary_lines
from streamgmm.cli.options import as_json, memory_limit, print_result
from streamgmm.progress import TerminalProgress
from streamgmm.units import format_bytes


@click.command(epilog="Example: streamgmm demo --output demo-run")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--memory", default="128MiB", show_default=True, metavar="SIZE", help="Bound on memory for the fit.")
@as_json
def demo(output: Path, device: str, memory: str, as_json: bool) -> None:
    """Cut 1.5 million patches from two photographs and fit 64 components in less memory than they take.

    DIR becomes a RUN folder; run again, it goes on, or shows the result.
    """
    demonstration.require_pictures()
    limit = memory_limit(memory)
    with TerminalProgress(quiet=as_json) as progress:
        data = demonstration.prepare_data(output, progress)
        source, result = demonstration.fit_patches(data, output, device, limit, progress)
    pictures = demonstration.draw(result, output)
    page = demonstration.write_page(output)
    size = source.shape[0] * source.shape[1] * source.dtype.itemsize
    facts = {**result.summary(), "array_bytes": size, "memory_limit": limit, "pictures": [str(p) for p in pictures]}
    facts["report"] = str(page)
    lines = [
        "",
        f"array            {data} ({format_bytes(size)}), fitted within {memory}",
        *summary_lines(result, output),
        *(f"picture          {path}" for path in pictures),
        f"report           {page}",
    ]
    print_result(facts, lines, as_json=as_json)
