"""Which columns of a table are the features, and their values as rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa

from streamgmm.errors import DataError
from streamgmm.io.sources.base import Rows
from streamgmm.io.wording import listed


@dataclass(frozen=True)
class Columns:
    """The columns that hold the features of a table.

    Attributes
    ----------
    names : tuple of str
        One column of lists, or one column of numbers a feature.
    lists : bool
        Whether it is one column of lists.
    n_features : int or None
        None where only the rows themselves tell: lists of variable length.
    dtype : numpy.dtype
        Of the stored values.
    """

    names: tuple[str, ...]
    lists: bool
    n_features: int | None
    dtype: np.dtype[np.generic]


def choose_columns(name: str, schema: pa.Schema, column: str | None) -> Columns:
    """The features of a table: ``column``, or its only column of lists of numbers, or all columns if all are numbers.

    Raises
    ------
    DataError
        No such column, more than one choice, or none.
    """
    fields = list(schema)
    if column is not None:
        fields = [field for field in fields if field.name == column]
        if len(fields) != 1:
            state = "no" if not fields else "more than one"
            raise DataError(f"{name}: has {state} column {column!r}; its columns: {listed(schema.names)}")
    lists = [field for field in fields if _is_list(field.type) and _is_number(field.type.value_type)]
    if len(lists) > 1:
        names = [field.name for field in lists]
        raise DataError(f"{name}: has several columns of lists, {listed(names)}; name one: {name}::{names[0]}")
    if lists:
        kind = lists[0].type
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
        return Columns((lists[0].name,), True, width, _numpy_dtype(kind.value_type))
    wrong = [field for field in fields if not _is_number(field.type)]
    if wrong or not fields:
        told = f"column {wrong[0].name!r} is {wrong[0].type}" if wrong else "it has no columns"
        raise DataError(
            f"{name}: holds neither one column of lists of numbers nor numbers alone ({told}); "
            f"name the column of the vectors, as {name}::COLUMN"
        )
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
        raise DataError(f"{name}: has columns of the same name; rename them")
    dtype = reduce(np.promote_types, (_numpy_dtype(field.type) for field in fields))
    return Columns(tuple(names), False, len(names), dtype)


def rows_of(batch: pa.RecordBatch, columns: Columns, n_features: int, first: int) -> Rows:
    """The features of a batch, shape (n, D), of ``columns.dtype``; rows count from ``first`` in messages.

    Raises
    ------
    ValueError
        A value is missing, or a list has another length; the message names the row.
    """
    arrays = [batch.column(batch.schema.get_field_index(column)) for column in columns.names]
    for column, array in zip(columns.names, arrays, strict=True):
        if array.null_count:
            row = first + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"column {column!r} is missing in row {row}; fill it or leave the row out")
    if not columns.lists:
        rows: np.ndarray = np.empty((len(batch), n_features), dtype=columns.dtype)
        for feature, array in enumerate(arrays):
            rows[:, feature] = array.to_numpy(zero_copy_only=False)
        return rows
    return _list_rows(arrays[0], columns, n_features, first)


def _list_rows(array: pa.Array, columns: Columns, n_features: int, first: int) -> Rows:
    if columns.n_features is None:
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        wrong = lengths != n_features
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"row {first + row} has {lengths[row]} features where the first has {n_features}")
    flat = array.flatten()
    if flat.null_count:
        row = first + int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False))) // n_features
        raise ValueError(f"column {columns.names[0]!r} misses a value in row {row}; fill it or leave the row out")
    if len(flat) != len(array) * n_features:
        raise ValueError(f"rows {first} to {first + len(array) - 1} hold {len(flat)} values; it is damaged")
    rows: np.ndarray = flat.to_numpy(zero_copy_only=True).reshape(len(array), n_features)
    return rows


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _numpy_dtype(kind: pa.DataType) -> np.dtype[np.generic]:
    dtype: np.dtype[np.generic] = np.dtype(kind.to_pandas_dtype())
    return dtype
