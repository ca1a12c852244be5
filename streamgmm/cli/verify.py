"""``streamgmm verify``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from tqdm import tqdm

from streamgmm.checkpoint import newest
from streamgmm.cli.options import as_json, one_path, print_result, threads_option, warn
from streamgmm.errors import DataError, RequestError
from streamgmm.io.sources import Source, open_source
from streamgmm.passes import Course
from streamgmm.units import format_bytes
from streamgmm.verification import verify as verify_source


@click.command(epilog="Example: streamgmm verify vectors.zarr --against run")
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.option("--against", metavar="RUN", type=click.Path(path_type=Path), help="Compare with what RUN was fitted on.")
@threads_option
@as_json
def verify(data: tuple[str, ...], against: Path | None, threads: int, as_json: bool) -> None:
    """Read all of DATA, compare every checksum there is, and list every bad chunk; exit 2 if there is one.

    --against compares it with the checksums that a run noted in its first pass, too.
    """
    unopened = [] if len(data) == 1 else [message for path in data if (message := _refused(path))]
    for message in unopened:
        _tell(message, as_json=as_json)
    if unopened:
        # Together they are not the data set that was meant, so its rows have no numbers; the others are read alone.
        sources = [open_source(path) for path in data if not _refused(path)]
        known: Mapping[int, int] = {}
        course = Course()
    else:
        sources = [open_source(one_path(data))]
        known, course = ({}, Course()) if against is None else _known(against, sources[0])
    begun = time.perf_counter()
    bad = [damage for source in sources for damage in _verified(source, known, course, threads, as_json=as_json)]
    seconds = time.perf_counter() - begun
    n_samples = sum(source.shape[0] for source in sources)
    size = sum(source.shape[0] * source.shape[1] * source.dtype.itemsize for source in sources)
    count = len(bad) + len(unopened)
    facts = {
        "n_samples": n_samples,
        "bytes": size,
        "seconds": seconds,
        "segments_compared": len(known),
        "bad": [*({"first": None, "last": None, "reason": message} for message in unopened), *bad],
        "n_bad": count,
    }
    rate = size / max(seconds, 1e-9) / 1e9
    compared = f", {len(known)} segments compared with {against}" if known else ""
    lines = [f"{n_samples:,} rows ({format_bytes(size)}) read at {rate:.2f} GB/s{compared}: {count or 'nothing'} bad"]
    print_result(facts, lines, as_json=as_json)
    if count:
        first = bad[0]["reason"] if bad else unopened[0]
        raise DataError(f"{data[0]}: {count} bad part{'s' if count > 1 else ''}, the first: {first}")


def _verified(
    source: Source, known: Mapping[int, int], course: Course, threads: int, *, as_json: bool
) -> list[dict[str, object]]:
    """Every damage as a JSON object, told as soon as it is found."""
    found: list[dict[str, object]] = []
    quiet = as_json or not sys.stderr.isatty()
    with tqdm(total=source.shape[0], unit=" rows", unit_scale=True, leave=False, disable=quiet) as bar:
        for damage in verify_source(source, known, threads, bar.update, course):
            found.append({"first": damage.first, "last": damage.last - 1, "reason": damage.reason})
            _tell(f"rows {damage.first:,} to {damage.last - 1:,}: {damage.reason}", as_json=as_json)
    return found


def _tell(text: str, *, as_json: bool) -> None:
    if not as_json:
        tqdm.write(f"bad  {text}", file=sys.stdout)


def _refused(path: str) -> str:
    """Why ``path`` cannot be opened; empty where it can."""
    try:
        open_source(path).close()
    except DataError as error:
        return str(error)
    return ""


def _known(run: Path, source: Source) -> tuple[dict[int, int], Course]:
    """Checksums that ``run`` noted of the regions of its course; it must be a run of data of this shape."""
    if not (run / "checkpoints").is_dir():
        raise RequestError(f"{run}: holds no checkpoints to compare with; name a RUN that a fit wrote")
    loaded, _ = newest(run / "checkpoints", torch.device("cpu"), warn)
    if loaded is None:
        raise RequestError(f"{run}: holds no checkpoint yet to compare with; verify without --against")
    state, _, identity = loaded
    if identity.get("shape") != list(source.shape):
        raise DataError(
            f"{source.name}: has shape {list(source.shape)}, and {run} was fitted on {identity.get('shape')}; "
            "name that data"
        )
    return dict(state.checksums), state.course
