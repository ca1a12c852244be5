"""What commands that stream rows through a model do alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

import click
import numpy as np
from tqdm import tqdm

from streamgmm.errors import RequestError, RunError
from streamgmm.io.sources import Cache, Source, open_source
from streamgmm.io.sources.transformed import ROWS, as_fitted
from streamgmm.mixture import Float64Array, Mixture, load_transformation
from streamgmm.transforms import FILE, Transformation

Bar: TypeAlias = "tqdm[NoReturn]"

Piece = TypeVar("Piece")


def model_of(run: str) -> Mixture:
    """The model in a RUN folder or in a model file.

    Raises
    ------
    RunError
        The run is unfinished.
    DataError, DamagedFileError
        There is no model, or it is damaged.
    """
    path = Path(run)
    if path.is_dir() and (path / "config.json").exists() and not (path / "model.safetensors").exists():
        raise RunError(f"{run}: is unfinished, so it has no model yet; run its fit again, and it goes on to the end")
    return Mixture.load(path)


def fitted_rows(run: str, data: str | list[str], rows: str, cache: Cache | None = None) -> Source:
    """DATA as the rows that the model of RUN was fitted on; ``rows`` is what ``--rows`` says of it.

    RUN may also be posting lists, or centroids, of which nothing is known but their width.

    Raises
    ------
    DataError, DamagedFileError
        It cannot be read, or be made such rows.
    """
    return as_fitted(open_source(data, cache), _transformation_of(Path(run)), rows)


def _transformation_of(run: Path) -> Transformation | None:
    if run.suffix == ".safetensors" or (run / "model.safetensors").exists():
        return load_transformation(run)
    return Transformation.load(run / FILE) if (run / FILE).is_file() else None


rows_option = click.option(
    "--rows",
    type=click.Choice(ROWS),
    default="auto",
    show_default=True,
    help="What DATA holds, where RUN was fitted on prepared rows: raw vectors are prepared alike.",
)


def spare(data: tuple[str, ...], out: Path) -> None:
    """Refuse to replace ``data`` by what is computed from it, whatever --overwrite allows.

    Raises
    ------
    RequestError
        ``out`` is one of ``data``.
    """
    if any(Path(path).resolve() == out.resolve() for path in data):
        raise RequestError(f"{out}: is the data itself; name another output")


def counted(pieces: Iterable[Piece], total: int, rows: Callable[[Piece], int], *, quiet: bool) -> Iterator[Piece]:
    """``pieces`` as they come, with a bar of ``total`` rows on stderr where that is a terminal."""
    silent = quiet or not sys.stderr.isatty()
    bar: Bar = tqdm(total=total, unit=" rows", unit_scale=True, leave=False, dynamic_ncols=True, disable=silent)
    with bar:
        for piece in pieces:
            yield piece
            bar.update(rows(piece))


def in_blocks(chunks: Iterable[Float64Array], rows: int) -> Iterator[Float64Array]:
    """The same numbers in arrays of exactly ``rows`` (the last may be shorter), however they were cut before."""
    held: list[Float64Array] = []
    count = 0
    for chunk in chunks:
        while count + len(chunk) >= rows:
            head, chunk = chunk[: rows - count], chunk[rows - count :]
            yield np.concatenate([*held, head])
            held, count = [], 0
        if len(chunk):
            held.append(chunk)
            count += len(chunk)
    if held:
        yield np.concatenate(held)
