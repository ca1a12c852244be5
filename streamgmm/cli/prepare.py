"""``streamgmm prepare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from streamgmm.cli.options import as_json, one_path, print_result
from streamgmm.cli.streaming import Bar
from streamgmm.units import format_bytes

if TYPE_CHECKING:
    from streamgmm.prepare import Prepared

_EXAMPLE = (
    "Example: streamgmm prepare vectors.parquet vectors.zarr --steps drop,l2 --shuffle --ids. "
    "Or: streamgmm prepare base.fbin base.zarr --steps standardise,pca=32 --dtype float16 --holdout 0.05. "
    "Killed? The same command goes on where it stopped."
)


@click.command(epilog=_EXAMPLE)
@click.argument("data", metavar="SRC...", nargs=-1, required=True, type=click.Path())
@click.argument("destination", metavar="DST.zarr", type=click.Path(path_type=Path))
@click.option(
    "--steps",
    default="",
    metavar="STEP[,STEP…]",
    help="In order: drop, impute=mean, impute=0, l2, standardise, pca=D, whiten=D, project=D.",
)
@click.option("--columns", default="", metavar="C[,C…]", help="Numbers and ranges (0:64,70), or names of a table's.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "float16", "int8"]),
    help="[default: as in SRC, or float32 where a step computes]",
)
@click.option("--shuffle", is_flag=True, help="Write the rows in a random order, told by --seed.")
@click.option("--holdout", type=float, default=0.0, metavar="F", help="Share of the rows for NAME.held-out.zarr.")
@click.option("--ids", is_flag=True, help="Write the number of each row in SRC to NAME.ids.zarr.")
@click.option("--id-column", metavar="NAME", help="Write what this column of a table says instead; integers.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--shard-size", default="64MiB", show_default=True, metavar="SIZE")
@click.option("--memory", default="1GiB", show_default=True, metavar="SIZE", help="Bound on the growth of the process.")
@click.option("--workers", type=click.IntRange(1), help="Tasks at once.  [default: the cores that --memory allows]")
@click.option(
    "--scheduler",
    default="threads",
    show_default=True,
    metavar="WHERE",
    help="threads, processes, or a Dask scheduler's address (tcp://…).",
)
@click.option("--fresh", is_flag=True, help="Discard what was begun, move what was finished aside, and start over.")
@as_json
def prepare(
    data: tuple[str, ...],
    destination: Path,
    steps: str,
    columns: str,
    dtype: str | None,
    shuffle: bool,
    holdout: float,
    ids: bool,
    id_column: str | None,
    seed: int,
    shard_size: str,
    memory: str,
    workers: int | None,
    scheduler: str,
    fresh: bool,
    as_json: bool,
) -> None:
    """Write the rows of SRC to DST.zarr, a Zarr array that a fit reads straight into place.

    SRC is whatever fit takes, or CSV files. What the steps learn from the rows goes with them, into the model that is
    fitted on them, and is applied to raw vectors by predict and score.
    """
    # Dask takes most of a second to import; no other command needs it.
    from streamgmm.prepare import prepare as prepare_rows

    with _Bars(quiet=as_json) as progress:
        found = prepare_rows(
            one_path(data),
            destination,
            steps,
            columns=columns,
            dtype=dtype,
            shuffle=shuffle,
            holdout=holdout,
            ids=ids,
            id_column=id_column,
            seed=seed,
            shard_size=shard_size,
            memory=memory,
            workers=workers,
            scheduler=scheduler,
            fresh=fresh,
            progress=progress,
        )
    print_result(found.facts, _lines(found), as_json=as_json)


class _Bars:
    """A bar a stage on stderr where that is a terminal; a line a stage on stdout otherwise."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Bar | None = None

    def stage(self, name: str, total: int) -> None:
        self._close()
        if self._quiet or not total:
            return
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=name, unit=" tasks", leave=False, dynamic_ncols=True)
        else:
            click.echo(f"{name}: {total} tasks …")

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def tell(self, text: str) -> None:
        click.echo(f"streamgmm: {text}", err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _lines(found: Prepared) -> list[str]:
    """What a person wants to know."""
    facts = found.facts
    size = format_bytes(int(str(facts["bytes"])))
    lines = [
        f"rows             {found.shape[0]:,} × {found.shape[1]} {found.transformation.dtype.name} ({size})",
        f"transformation   {found.transformation.describe()}",
    ]
    if found.held_out_shape[0]:
        lines.append(f"held out         {found.held_out_shape[0]:,}")
    if facts["n_dropped"]:
        lines.append(f"dropped          {facts['n_dropped']:,} rows that are not finite")
    if found.stages:
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.stages.items())
        lines.append(f"time             {found.seconds:.1f} s ({told})")
        lines.append(f"memory           {found.workers} tasks at once, at most {format_bytes(found.needed_bytes)}")
    else:
        lines.insert(0, f"{found.path} is finished already:")
    written = facts["written"]
    assert isinstance(written, list)
    return [*lines, f"saved in         {', '.join(written)}"]
