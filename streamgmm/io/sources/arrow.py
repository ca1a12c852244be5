"""Arrow IPC files (``.arrow``, ``.feather``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from streamgmm.errors import DataError
from streamgmm.io.plan import Extent
from streamgmm.io.sources.array import stored_dtype
from streamgmm.io.sources.base import STORED_DTYPES, check_shape
from streamgmm.io.sources.columns import Columns, choose_columns
from streamgmm.io.sources.extents import ExtentSource, Placement
from streamgmm.io.sources.raw import RawFile
from streamgmm.io.sources.tables import TableSource
from streamgmm.io.wording import reason_of

MAGIC = b"ARROW1"


class ArrowSource(ExtentSource):
    """Rows of an uncompressed Arrow IPC file whose vectors are a FixedSizeList column; shape (N, D).

    The values of such a column lie side by side in the file, one run a record batch: runs are found once, through a
    memory map that is dropped again, and read straight into place.
    """

    def __init__(self, name: str, file: RawFile, n_features: int, dtype: np.dtype[np.generic], runs: Runs) -> None:
        self.name, self._file = name, file
        self.dtype = dtype
        self.shape = check_shape(name, (int(runs.starts[-1]), n_features))
        self._runs = runs

    def placements(self, start: int, stop: int) -> Iterator[Placement]:
        row_bytes = self.shape[1] * self.dtype.itemsize
        starts = self._runs.starts
        run = int(np.searchsorted(starts, start, side="right")) - 1
        row = start
        while row < stop:
            first, last = int(starts[run]), min(stop, int(starts[run + 1]))
            if row < last:
                offset = int(self._runs.offsets[run]) + (row - first) * row_bytes
                yield Placement(self._file, offset, (last - row) * row_bytes, (row - start) * row_bytes)
                row = last
            run += 1

    def close(self) -> None:
        self._file.close()


class ArrowTableSource(TableSource):
    """Rows of any other Arrow IPC file: compressed, several columns of numbers, or lists of variable length.

    A slow path: every pass decodes every record batch again, whole.
    """

    def __init__(self, name: str, file: RawFile, columns: Columns, n_features: int, rows: list[int], why: str) -> None:
        self._file = file
        self._lock = Lock()
        self._prepare(name, columns, n_features, rows)
        self.slow_because = why
        self.read_granule = max(rows)

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        # Where a batch lies is not told by the library; a pass reads the file once.
        if stop == self.shape[0]:
            yield self._file.extent(0, self._file.size)

    def close(self) -> None:
        super().close()
        self._file.close()

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(self._file.path) as stream:
            batch = pa.ipc.open_file(stream).get_batch(group)
            batch.validate()
            yield batch


class Runs:
    """Where the values of each record batch begin: first rows (one more than there are batches), and byte offsets."""

    def __init__(self, rows: list[int], offsets: list[int]) -> None:
        self.starts: np.ndarray = np.cumsum([0, *rows], dtype=np.int64)
        self.offsets: np.ndarray = np.asarray(offsets, dtype=np.int64)


def open_arrow(path: str | os.PathLike[str], column: str | None = None) -> ArrowSource | ArrowTableSource:
    """The rows of an Arrow IPC file, read straight into place where they lie in it as they are.

    Parameters
    ----------
    path : path
    column : str, optional
        The column that holds the vectors, where that is not the only one of lists.

    Raises
    ------
    DataError
        No Arrow file, a stream, damaged, missing values, or no such column.
    """
    file = RawFile(path)
    name = file.path
    magic: np.ndarray = np.empty(min(len(MAGIC), file.size), np.uint8)
    file.read_into(0, magic)
    if magic.tobytes() != MAGIC:
        raise DataError(f"{name}: is no Arrow IPC file (an Arrow stream?); write it with pyarrow.ipc.new_file")
    try:
        return _open(name, file, column)
    except DataError:
        raise
    # pyarrow raises OSError, ValueError and its own errors on damaged bytes.
    except Exception as error:
        raise DataError(f"{name}: is no readable Arrow file ({reason_of(error)}); restore it") from error


def _open(name: str, file: RawFile, column: str | None) -> ArrowSource | ArrowTableSource:
    with pa.memory_map(name) as mapped:
        whole = mapped.read_buffer()
        opened = pa.ipc.open_file(whole)
        columns = choose_columns(name, opened.schema, column)
        dtype = stored_dtype(name, columns.dtype)
        why = "" if columns.lists and columns.n_features else "its features are separate columns or lists"
        if not why and dtype != columns.dtype:
            why = f"{columns.dtype} is converted to {dtype}"
        if not why and columns.dtype not in STORED_DTYPES:
            why = "its byte order is not this machine's"
        rows: list[int] = []
        offsets: list[int] = []
        width = columns.n_features
        for index in range(opened.num_record_batches):
            batch = opened.get_batch(index)
            batch.validate()
            rows.append(len(batch))
            array = batch.column(batch.schema.get_field_index(columns.names[0]))
            if width is None and len(array):
                width = array.value_lengths()[0].as_py() or 0
            if why:
                continue
            offset = _offset(name, array, whole, sum(rows) - len(batch), columns, width or 0)
            if offset is None:
                why = "its record batches are compressed"
            else:
                offsets.append(offset)
    check_shape(name, (sum(rows), width or 0))
    assert width is not None
    if why:
        return ArrowTableSource(name, file, columns, width, rows, why)
    return ArrowSource(name, file, width, dtype, Runs(rows, offsets))


def _offset(name: str, array: pa.Array, whole: pa.Buffer, first: int, columns: Columns, width: int) -> int | None:
    """The byte of the file where the values of a FixedSizeList array begin; None where they lie in other memory."""
    values = array.values
    if array.null_count or values.null_count:
        raise DataError(f"{name}: column {columns.names[0]!r} misses values in rows from {first} on; fill them")
    buffer, item = values.buffers()[1], columns.dtype.itemsize
    if not len(array):
        return 0
    begin = buffer.address + (values.offset + array.offset * width) * item - whole.address
    length = len(array) * width * item
    inside = whole.address <= buffer.address < whole.address + whole.size
    if not inside:
        return None
    if begin + length > whole.size or values.offset * item + length > buffer.size:
        raise DataError(f"{name}: the batch at row {first} points past its end; it is truncated, restore it")
    return int(begin)
