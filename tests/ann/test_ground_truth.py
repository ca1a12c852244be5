from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from streamgmm.ann.ground_truth import exact_neighbours, read_truth
from streamgmm.errors import DataError, RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source


def brute(x: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    distances = ((queries.astype(np.float64)[:, None] - x.astype(np.float64)) ** 2).sum(2)
    return distances.argsort(axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8])
def test_neighbours_are_the_true_ones(settings: InferenceSettings, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x, queries = (100 + 20 * rng.normal(size=(n, 6)) for n in (3001, 37))
    got = exact_neighbours(open_source(x.astype(dtype)), queries.astype(dtype), 10, settings)
    np.testing.assert_array_equal(got, brute(x.astype(dtype), queries.astype(dtype), 10))


def test_ties_and_too_few(settings: InferenceSettings) -> None:
    x = np.zeros((5, 2), np.float32)
    got = exact_neighbours(open_source(x), np.zeros((2, 2), np.float32), 7, settings)
    assert got.tolist() == [[0, 1, 2, 3, 4, -1, -1]] * 2


def test_refused(settings: InferenceSettings) -> None:
    x = np.zeros((5, 2), np.float32)
    with pytest.raises(RequestError, match=r"shape \(Q, 2\)"):
        exact_neighbours(open_source(x), np.zeros((2, 3)), 1, settings)
    with pytest.raises(DataError, match="query 1"):
        exact_neighbours(open_source(x), np.array([[0, 1], [np.nan, 1]]), 1, settings)
    x[3, 1] = np.inf
    with pytest.raises(DataError, match="row 3"):
        exact_neighbours(open_source(x), np.zeros((2, 2)), 1, settings)


def test_every_format_of_truth(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).integers(0, 1000, (7, 12)).astype("<i4")
    np.column_stack([np.full(7, 12, "<i4"), truth]).tofile(tmp_path / "t.ivecs")
    header = np.array([7, 12], "<u4").tobytes()
    (tmp_path / "t.ibin").write_bytes(header + truth.tobytes())
    (tmp_path / "t.bin").write_bytes(header + truth.tobytes() + truth.astype("<f4").tobytes())
    np.save(tmp_path / "t.npy", truth)
    with h5py.File(tmp_path / "t.hdf5", "w") as file:
        file["neighbors"] = truth
        file["distances"] = truth * 0.5
    for name in ("t.ivecs", "t.ibin", "t.bin", "t.npy", "t.hdf5::neighbors"):
        np.testing.assert_array_equal(read_truth(tmp_path / name, 7, 1000, 10), truth[:, :10])
    with pytest.raises(DataError, match="not their distances"):
        read_truth(tmp_path / "t.hdf5::distances", 7, 1000, 10)
    with pytest.raises(DataError, match="is of 7 queries"):
        read_truth(tmp_path / "t.ivecs", 8, 1000, 10)
    with pytest.raises(DataError, match="lower k"):
        read_truth(tmp_path / "t.bin", 7, 1000, 13)
    with pytest.raises(DataError, match="the data has 100"):
        read_truth(tmp_path / "t.npy", 7, 100, 10)
    for name in ("t.ivecs", "t.ibin"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
        with pytest.raises(DataError, match="restore it"):
            read_truth(tmp_path / name, 7, 1000, 10)
    with pytest.raises(DataError):
        read_truth(tmp_path / "none.ivecs", 7, 1000, 10)
