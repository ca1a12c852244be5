"""Tables, CSV and Parquet, through `dask.dataframe`: a partition is a row group, or some MB of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamgmm.errors import DataError
from streamgmm.io.optional import require
from streamgmm.io.wording import listed, reason_of
from streamgmm.prepare.identifiers import IdColumn
from streamgmm.prepare.inputs import Partitions

BLOCK_BYTES = 16 << 20
"""Text of a CSV file that is parsed at once."""


def open_tables(paths: Sequence[str], names: Sequence[str], id_column: str | None = None) -> Partitions:
    """The rows of CSV or Parquet files, in the order given.

    ``file.parquet::column`` names the column of the vectors, as ``names`` does.

    Raises
    ------
    RequestError
        dask.dataframe, which needs pandas (and pyarrow for Parquet), is not installed.
    DataError
        The files cannot be read, or have no such column.
    """
    targets = [path.partition("::")[0] for path in paths]
    members = {member for _, mark, member in (path.partition("::") for path in paths) if mark}
    for target in targets:
        if not Path(target).exists():
            raise DataError(f"{target}: does not exist; check the path")
    require("pandas", "tables", targets[0])
    require("pyarrow", "tables", targets[0])
    dataframe = require("dask.dataframe", "tables", targets[0])
    import dask

    files = [file for target in targets for file in _files(Path(target))]
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise DataError(f"{targets[0]}: CSV and Parquet cannot be joined; prepare them one by one")
    wanted = [*members, *names]
    try:
        # Lists of numbers are objects to pandas, which Dask would otherwise turn into strings.
        with dask.config.set({"dataframe.convert-string": False}):
            if suffixes == {".csv"}:
                frame = dataframe.read_csv(list(map(str, files)), blocksize=BLOCK_BYTES)
                largest = 4 * BLOCK_BYTES  # a number of a few digits becomes eight bytes, on its way more
            else:
                largest = max(_largest_group(file) for file in files)
                frame = dataframe.read_parquet(list(map(str, files)), split_row_groups=True)
            found = of_frame(frame, wanted, paths[0], id_column)
    except DataError:
        raise
    # pandas and pyarrow raise whatever they like on files that are not what they say.
    except Exception as error:
        raise DataError(f"{paths[0]}: cannot be read as a table ({reason_of(error)}); restore it") from error
    states = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return replace(found, fingerprint=str([states, wanted]), largest=largest)


def of_frame(frame: Any, names: Sequence[str], name: str, id_column: str | None = None) -> Partitions:
    """The rows of a Dask dataframe: the columns named, or all where all are numbers, or its only column of lists.

    What ``id_column`` holds is what the rows are called, and no feature.

    Raises
    ------
    DataError
        No such column, or one that holds no numbers.
    """
    all_names = list(map(str, frame.columns))
    asked = [*names, *([] if id_column is None else [id_column])]
    missing = [wanted for wanted in asked if wanted not in all_names]
    if missing:
        raise DataError(f"{name}: has no column {missing[0]!r}; its columns: {listed(all_names)}")
    wanted = list(names) or [column for column in all_names if column != id_column]
    kinds = {str(column): kind for column, kind in frame.dtypes.items()}
    lists = [column for column in wanted if not _numeric(kinds[column])]
    if lists and len(wanted) > 1:
        raise DataError(
            f"{name}: column {lists[0]!r} holds no single numbers; name the columns that do, or the one of lists, "
            "with --columns"
        )
    parts = frame[list(dict.fromkeys([*wanted, *asked]))].to_delayed()
    to_rows: ListRows | NumberRows
    if lists:
        to_rows = ListRows(name, wanted[0])
    else:
        to_rows = NumberRows(tuple(wanted), _dtype([kinds[column] for column in wanted]))
    to_ids = None if id_column is None else IdColumn(name, id_column)
    return Partitions(name, parts, str(frame._name), to_rows, 0, to_ids)


@dataclass(frozen=True)
class NumberRows:
    """A column a feature; missing values become NaN."""

    columns: tuple[str, ...]
    dtype: np.dtype[np.generic]

    def __call__(self, frame: Any) -> np.ndarray:
        return np.asarray(frame[list(self.columns)].to_numpy(dtype=self.dtype, na_value=np.nan))


def _dtype(kinds: Sequence[Any]) -> np.dtype[np.generic]:
    """One type that holds the values of all columns, and NaN."""
    common = np.result_type(*(np.dtype(getattr(kind, "numpy_dtype", kind)) for kind in kinds))
    if common.kind == "f":
        return common
    return np.dtype(np.float32 if common.itemsize <= 2 else np.float64)


@dataclass(frozen=True)
class ListRows:
    """One column of lists of equally many numbers; a missing list is a row of NaN, a missing number NaN."""

    name: str
    column: str

    def __call__(self, frame: Any) -> np.ndarray:
        cells = list(frame[self.column])
        vectors = [cell for cell in cells if cell is not None and np.ndim(cell) == 1]
        try:
            rows: np.ndarray = np.stack(vectors) if vectors else np.empty((0, 1))
            if rows.dtype == object:
                rows = rows.astype(np.float64)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.name}: column {self.column!r} holds no lists of equally many numbers ({reason_of(error)}); "
                "name another with --columns"
            ) from None
        if rows.ndim != 2 or rows.dtype.kind not in "fiub" or any(isinstance(cell, str) for cell in cells):
            raise DataError(
                f"{self.name}: column {self.column!r} holds no lists of numbers; name another with --columns"
            )
        if len(vectors) == len(cells):
            return rows
        whole: np.ndarray = np.full((len(cells), rows.shape[1]), np.nan, np.result_type(rows.dtype, np.float32))
        there = [np.ndim(cell) == 1 and cell is not None for cell in cells]
        whole[np.array(there)] = rows
        return whole


def _largest_group(path: Path) -> int:
    """Bytes of the largest row group of a Parquet file, decoded."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    return max((metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)), default=0)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(entry for entry in path.iterdir() if entry.name[0] not in "._")


def _numeric(kind: Any) -> bool:
    return getattr(kind, "kind", "O") in "fiub"
