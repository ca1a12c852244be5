"""CSV, Parquet and data frames, through Dask."""

from __future__ import annotations

from pathlib import Path

import dask
import dask.dataframe
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from streamgmm.errors import DataError, RequestError
from streamgmm.prepare import prepare
from tests.prepare.conftest import raw_rows

# Dask's own use of pandas warns of what pandas will change.
pytestmark = pytest.mark.filterwarnings("ignore")


def read(path):
    return zarr.open_array(path, mode="r")[:]


@pytest.fixture
def frame(here):
    x = raw_rows(1000, 4)
    return pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "n": np.arange(1000), "name": "row"})


def test_csv(frame, monkeypatch):
    monkeypatch.setattr("streamgmm.prepare.tables.BLOCK_BYTES", 9000)
    frame[:400].to_csv("1.csv", index=False)
    frame[400:].to_csv("2.csv", index=False)
    prepare(["1.csv", "2.csv"], "y.zarr", columns="b,a,n", ids=True, dtype="float64")
    expected = pd.concat([pd.read_csv("1.csv"), pd.read_csv("2.csv")])[["b", "a", "n"]].to_numpy()
    assert np.array_equal(read("y.zarr"), expected)
    assert np.array_equal(read("y.ids.zarr"), np.arange(1000))


def test_missing_values_are_nan(frame):
    frame.loc[::10, "b"] = None
    frame.loc[5, "n"] = None
    frame.to_parquet("x.parquet", row_group_size=64)
    with pytest.raises(DataError, match="holds NaN or infinity; add the step drop or impute"):
        prepare("x.parquet", "n.zarr", columns="b,n")
    found = prepare("x.parquet", "y.zarr", "drop", columns="b,n", dtype="float64")
    kept = frame[["b", "n"]].dropna()
    assert np.array_equal(read("y.zarr"), kept.to_numpy(dtype=float))
    assert found.facts["n_dropped"] == 101


@pytest.mark.parametrize("kind", ["fixed", "list"])
def test_parquet_with_a_column_of_vectors(here, kind):
    x = raw_rows(1000, 4)
    values = pa.array(x.reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(values, 4)
    if kind == "list":
        vectors = vectors.cast(pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": range(1000), "v": vectors}), "x.parquet", row_group_size=300)
    for data, columns in (("x.parquet", "v"), ("x.parquet::v", "")):
        prepare(data, "y.zarr", "l2", columns=columns, shuffle=True, ids=True, fresh=True)
        straight = np.array([row / np.sqrt((row**2).sum()) for row in x.astype(float)])
        np.testing.assert_allclose(read("y.zarr"), straight[read("y.ids.zarr")], rtol=1e-6)


def test_lists_that_are_missing(here):
    cells = [[1.0, 2.0], None, [3.0, None], [4.0, 5.0]]
    pq.write_table(pa.table({"v": pa.array(cells, pa.list_(pa.float32()))}), "x.parquet")
    prepare("x.parquet", "y.zarr", "drop", ids=True)
    assert read("y.zarr").tolist() == [[1, 2], [4, 5]]
    assert read("y.ids.zarr").tolist() == [0, 3]


def test_a_folder_and_a_data_frame(frame):
    Path("f").mkdir()
    frame[["a", "b"]][:500].to_parquet("f/1.parquet")
    frame[["a", "b"]][500:].to_parquet("f/2.parquet")
    prepare("f", "y.zarr")
    prepare(dask.dataframe.from_pandas(frame, npartitions=7), "z.zarr", columns=["a", "b"])
    assert read("y.zarr").tobytes() == read("z.zarr").tobytes() == frame[["a", "b"]].to_numpy().tobytes()


@pytest.mark.parametrize(
    ("data", "columns", "told"),
    [
        ("x.parquet", "nowhere", "has no column 'nowhere'; its columns: 'a', 'b', 'c', 'n', 'name'"),
        ("x.parquet", "", "column 'name' holds no single numbers"),
        ("x.parquet", "name", "holds no lists of numbers"),
        ("missing.csv", "", "does not exist"),
        ("broken.parquet", "", "cannot be read as a table"),
        (["x.parquet", "x.npy"], "a", "tables and arrays cannot be joined"),
        ("ragged.parquet", "", "holds no lists of equally many numbers"),
    ],
)
def test_what_cannot_be_read(frame, data, columns, told):
    frame.to_parquet("x.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 not PAR1")
    pq.write_table(pa.table({"v": [[1.0], [1.0, 2.0]]}), "ragged.parquet")
    with pytest.raises(DataError, match=told):
        prepare(data, "y.zarr", columns=columns)


def test_arrays_have_no_named_columns(here):
    with pytest.raises(RequestError, match="columns of an array are numbers"):
        prepare("x.npy", "y.zarr", columns="a")


def test_without_pandas(here, monkeypatch):
    Path("x.csv").write_text("a\n1\n")
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(RequestError, match=r"x\.csv: needs pandas; pip install 'streamgmm\[tables\]'"):
        prepare("x.csv", "y.zarr")


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_keep_what_a_column_calls_them(frame, kind, shuffle):
    frame["key"] = (np.arange(1000, dtype=np.int64) * 7 + (1 << 60))[::-1].copy()
    frame.loc[::10, "b"] = None
    frame = frame.drop(columns=["name", "n"])
    source = {"csv": "x.csv", "parquet": "x.parquet", "frame": dask.dataframe.from_pandas(frame, npartitions=7)}[kind]
    frame.to_csv("x.csv", index=False)
    frame.to_parquet("x.parquet", row_group_size=64)
    prepare(source, "y.zarr", "drop", id_column="key", dtype="float64", shuffle=shuffle, holdout=0.2, shard_size="4KiB")
    seen = []
    for rows, ids in (("y.zarr", "y.ids.zarr"), ("y.held-out.zarr", "y.held-out.ids.zarr")):
        expected = frame.set_index("key").loc[read(ids)]
        assert list(expected.columns) == ["a", "b", "c"]  # what rows are called is no feature of theirs
        np.testing.assert_allclose(read(rows), expected.to_numpy(dtype=float), rtol=1e-6)
        seen += read(ids).tolist()
    assert sorted(seen) == sorted(frame.dropna()["key"])


def test_what_rows_cannot_be_called(frame):
    frame["late"] = frame["n"].where(frame["n"] != 5)
    frame["huge"] = np.full(1000, 2**63, np.uint64)
    frame.to_parquet("x.parquet", row_group_size=64)
    for column, told in (("name", "holds what is no integer"), ("late", "missing values"), ("huge", "beyond int64")):
        with pytest.raises(DataError, match=f"id column '{column}' .*{told}.*--id-column"):
            prepare("x.parquet", f"{column}.zarr", columns="a,b", id_column=column)
    with pytest.raises(DataError, match="has no column 'key'"):
        prepare("x.parquet", "y.zarr", columns="a,b", id_column="key")
    np.save("x.npy", raw_rows(10, 2))
    with pytest.raises(RequestError, match="id column 'key': only Parquet and CSV have such columns; use --ids"):
        prepare("x.npy", "y.zarr", id_column="key")
