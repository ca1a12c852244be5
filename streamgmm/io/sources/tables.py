"""Tables that are decoded group by group: Parquet files, and Arrow files that are compressed or hold plain columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import Rows, Source, check_shape
from streamgmm.io.sources.columns import Columns, choose_columns, rows_of
from streamgmm.io.sources.granules import WINDOW_BYTES, Granules
from streamgmm.io.sources.raw import RawFile
from streamgmm.io.wording import reason_of

PIECE_BYTES = 4 << 20
"""Rows of a Parquet row group that are decoded at once."""


class TableSource(Source):
    """Rows of a table, decoded group by group; a format says what its groups are and how one is decoded."""

    read_path = "decode"

    def _prepare(self, name: str, columns: Columns, n_features: int, rows: Sequence[int]) -> None:
        """Set what every source has, for groups of ``rows`` rows each."""
        self.name = name
        self._columns = columns
        self.dtype = stored_dtype(name, columns.dtype)
        self.shape = check_shape(name, (sum(rows), n_features))
        self._granules = Granules(rows, self._decode)
        row_bytes = n_features * max(columns.dtype.itemsize, self.dtype.itemsize)
        self.read_granule = max(1, min(max(rows), WINDOW_BYTES // row_bytes))

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """The pieces of a group, in order."""
        raise NotImplementedError

    def _decode(self, group: int) -> Iterator[Rows]:
        row = self._granules.starts[group]
        for batch in self._batches(group):
            yield rows_of(batch, self._columns, self.shape[1], row)
            row += len(batch)

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        try:
            self._granules.read_into(start, stop, out)
        except MemoryError:
            raise
        # pyarrow raises OSError, ValueError and its own errors on damaged bytes, whichever layer meets them first.
        except Exception as error:
            reason = reason_of(error)
            raise DataError(
                f"{self.name}: rows {start} to {stop - 1} cannot be read: {reason}; restore it or write it again"
            ) from error

    def gather(self, indices: NDArray[np.int64]) -> tuple[Rows, int]:
        gathered = super().gather(indices)
        # Groups of which a few rows were wanted would lie in memory for nothing.
        self._granules.clear()
        return gathered

    def close(self) -> None:
        self._granules.clear()


class ParquetSource(TableSource):
    """Rows of a Parquet file: a column of lists of numbers, or columns of numbers; shape (N, D).

    A slow path: every pass decodes every page again. Memory holds a few row groups, or windows of large ones.

    Parameters
    ----------
    path : path
    column : str, optional
        The column that holds the vectors, where that is not the only one of lists.

    Raises
    ------
    DataError
        No Parquet file, damaged, encrypted, or no such column; or a first row without features.
    """

    def __init__(self, path: str | os.PathLike[str], column: str | None = None) -> None:
        self._file = RawFile(path)
        name = self._file.path
        try:
            with pq.ParquetFile(name, memory_map=False) as opened:
                self._metadata, schema = opened.metadata, opened.schema_arrow
        except Exception as error:
            raise DataError(f"{name}: is no readable Parquet file ({reason_of(error)}); restore it") from error
        columns = choose_columns(name, schema, column)
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) != self._metadata.num_rows:
            raise DataError(f"{name}: its row groups hold {sum(rows)} rows and its footer {self._metadata.num_rows}")
        check_shape(name, (sum(rows), 1))
        width = columns.n_features or self._first_width(name, columns)
        self._prepare(name, columns, width, rows)
        # Not which codec: pyarrow ends the process when it is asked for one that it does not know.
        self.slow_because = "Parquet pages are encoded"

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        starts = self._granules.starts
        for group in range(self._granules.of(start), len(starts) - 1):
            if start < starts[group + 1] <= stop:
                yield from self._group_extents(group)

    def close(self) -> None:
        super().close()
        self._file.close()

    def _group_extents(self, group: int) -> Iterator[Extent]:
        described = self._metadata.row_group(group)
        for index in range(described.num_columns):
            column = described.column(index)
            if column.path_in_schema.split(".")[0] in self._columns.names:
                offsets = [column.data_page_offset, column.dictionary_page_offset]
                first = min(offset for offset in offsets if offset)
                yield self._file.extent(first, max(0, min(column.total_compressed_size, self._file.size - first)))

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        row_bytes = self.shape[1] * self._columns.dtype.itemsize
        return self._read(group, self._columns, max(1, PIECE_BYTES // row_bytes))

    def _read(self, group: int, columns: Columns, batch_rows: int) -> Iterator[pa.RecordBatch]:
        # A reader of its own for each scan of a group: one reader is not for several threads.
        with pq.ParquetFile(
            self._file.path, metadata=self._metadata, memory_map=False, page_checksum_verification=True
        ) as opened:
            yield from opened.iter_batches(batch_rows, row_groups=[group], columns=list(columns.names))

    def _first_width(self, name: str, columns: Columns) -> int:
        """Features of the first row."""
        group = next(i for i in range(self._metadata.num_row_groups) if self._metadata.row_group(i).num_rows)
        try:
            array = next(self._read(group, columns, 1)).column(0)
            return check_shape(name, (1, array.value_lengths()[0].as_py() or 0))[1]
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{name}: its first row cannot be read ({reason_of(error)}); restore it") from error
