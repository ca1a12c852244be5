"""What there is to prepare: rows that can be read in any order, or partitions that must be computed first."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import zarr
from zarr.storage import LocalStore

from streamgmm.errors import DataError, RequestError
from streamgmm.io.bfloat16 import opaque
from streamgmm.io.objects.urls import scheme_of
from streamgmm.io.sources import Source, open_source
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.instances import is_dask
from streamgmm.prepare.identifiers import IdColumn, ids_path
from streamgmm.prepare.shards import digest_of, temporary_name
from streamgmm.storage import naming

if TYPE_CHECKING:
    from dask.delayed import Delayed

TABLES = (".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Reference:
    """A source that any task can open.

    Attributes
    ----------
    paths : tuple of str
        Absolute; empty where only the process that made it can read it.
    live : Source or None
        Itself, for tasks that are threads of this process.
    token : str
        Tells one preparation's files from an earlier one's of the same names.
    """

    paths: tuple[str, ...]
    live: Source | None
    token: str = field(default_factory=lambda: uuid4().hex)

    @classmethod
    def of_paths(cls, paths: Sequence[str]) -> Reference:
        """Files, opened; raises as `open_source`."""
        absolute = tuple(path if scheme_of(path) else str(Path(path).absolute()) for path in paths)
        # As the user wrote them, for messages.
        return cls(absolute, _open(tuple(paths)))

    def open(self) -> Source:
        return self.live if self.live is not None else _opened(self.paths, self.token)

    def travelling(self) -> Reference:
        """The same for other processes.

        Raises
        ------
        RequestError
            They cannot read it.
        """
        if not self.paths:
            raise RequestError(
                f"{self.open().name}: is in the memory of this process, where the scheduler's workers cannot read it; "
                "save it and give its path"
            )
        return replace(self, live=None)


def _open(paths: tuple[str, ...]) -> Source:
    return open_source(paths[0] if len(paths) == 1 else list(paths))


@lru_cache(2)
def _opened(paths: tuple[str, ...], token: str) -> Source:
    return _open(paths)


@dataclass(frozen=True, eq=False)
class Partitions:
    """Parts of a Dask collection, each to be computed once, where Dask says, and kept as a file until all is done.

    Attributes
    ----------
    name : str
        For messages.
    parts : sequence of Delayed
    fingerprint : str
        Equal for equal graphs over equal inputs.
    to_rows : callable or None
        A computed part to rows (n, D), where it is not such an array.
    largest : int
        Bytes of the largest part, as far as that is known.
    to_ids : callable or None
        A computed part to what its rows are called, (n,) int64, where a column tells.
    """

    name: str
    parts: Sequence[Delayed]
    fingerprint: str
    to_rows: Callable[[Any], np.ndarray] | None
    largest: int
    to_ids: IdColumn | None = None


def resolve(data: Any, columns: Sequence[str | int | slice], id_column: str | None = None) -> Reference | Partitions:
    """``data`` as something that can be prepared.

    Parameters
    ----------
    data : path, list of paths, array, Source, Dask array or Dask dataframe
        ``.csv`` and ``.parquet`` files are read as tables by `dask.dataframe`; everything else by `open_source`.
    columns : sequence
        Names, of a table's columns; numbers are not looked at here.
    id_column : str, optional
        Of a table: what its rows are called.

    Raises
    ------
    DataError, RequestError
        It cannot be opened; one line that names it and the remedy.
    """
    names = [column for column in columns if isinstance(column, str)]
    paths = _paths(data)
    if paths and any(_is_table(path) for path in paths):
        from streamgmm.prepare.tables import open_tables

        if not all(_is_table(path) for path in paths):
            raise DataError(f"{paths[0]}: tables and arrays cannot be joined; prepare them one by one")
        return open_tables(paths, names, id_column)
    module = sys.modules.get("dask.dataframe")
    if module is not None and isinstance(data, module.DataFrame):
        from streamgmm.prepare.tables import of_frame

        return of_frame(data, names, "Dask dataframe", id_column)
    if id_column is not None:
        raise RequestError(f"id column {id_column!r}: only Parquet and CSV have such columns; use --ids")
    if names:
        raise RequestError(f"columns of an array are numbers, such as 0:64; got {names[0]!r}")
    if is_dask(data):
        return of_array(data)
    if paths:
        return Reference.of_paths(paths)
    if isinstance(data, zarr.Array) and isinstance(data.store, LocalStore):
        return Reference.of_paths([str(Path(data.store.root, data.path))])
    return Reference((), open_source(data))


def _paths(data: Any) -> list[str]:
    """``data`` as paths; none where it is anything else."""
    items = data if isinstance(data, (list, tuple)) else [data]
    paths = [os.fsdecode(item) for item in items if isinstance(item, (str, os.PathLike))]
    return paths if len(paths) == len(items) else []


def _is_table(path: str) -> bool:
    target = Path(path.partition("::")[0])
    if target.is_dir() and target.suffix != ".zarr":
        inside = {entry.suffix.lower() for entry in target.iterdir() if entry.name[0] not in "._"}
        return bool(inside) and inside <= set(TABLES)
    return target.suffix.lower() in TABLES


def of_array(array: Any) -> Partitions:
    """The row chunks of a Dask array; raises DataError where it has no rows, or no known number of features."""
    if array.ndim != 2 or array.shape[1] != array.shape[1] or array.shape[1] < 1:
        raise DataError(f"dask array: must have rows and a known number of features; its shape is {array.shape}")
    array = opaque(array)
    stored_dtype("dask array", array.dtype)
    array = array.rechunk({1: array.shape[1]}) if array.numblocks[1] > 1 else array
    known = [rows for rows in array.chunks[0] if rows == rows]
    largest = int(max(known, default=0)) * array.shape[1] * array.dtype.itemsize
    return Partitions("dask array", list(array.to_delayed()[:, 0]), str(array.name), None, largest)


def staged_path(folder: str, part: int) -> Path:
    """Where the rows of a part are kept."""
    return Path(folder, "staged", f"{part:06d}.npy")


def save_part(
    block: Any,
    to_rows: Callable[[Any], np.ndarray] | None,
    folder: str,
    part: int,
    to_ids: IdColumn | None = None,
) -> dict[str, Any]:
    """Keep a computed part as ``.npy``, and what its rows are called beside it; gives what the journal notes."""
    rows = np.asarray(block) if to_rows is None else to_rows(block)
    if rows.ndim != 2:
        raise DataError(f"partition {part}: is of shape {rows.shape}; give a collection of rows and features")
    rows = np.ascontiguousarray(rows, dtype=stored_dtype(f"partition {part}", rows.dtype))
    files = {staged_path(folder, part): rows}
    if to_ids is not None:
        files[ids_path(staged_path(folder, part))] = to_ids(block)
    for path, array in files.items():
        with naming(path):
            path.parent.mkdir(exist_ok=True)
            temporary = temporary_name(path)
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            temporary.replace(path)
    return {
        "files": {path.relative_to(folder).as_posix(): digest_of(path) for path in files},
        "bytes": sum(path.stat().st_size for path in files),
        "rows": len(rows),
    }
