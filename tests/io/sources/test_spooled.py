"""Rows of an iterator: read once, kept without a name."""

from __future__ import annotations

import gc
import os
import weakref

import ml_dtypes
import numpy as np
import pytest

from streamgmm.errors import DataError
from streamgmm.io.sources.spooled import SpooledSource

X = np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8, np.uint8, ml_dtypes.bfloat16])
def test_reads_what_was_given(dtype):
    x = (X * 10).astype(dtype)
    source = SpooledSource(iter(np.array_split(x, 7)))
    assert source.shape == (101, 3)
    assert source.read(0, 101).tobytes() == x.tobytes()
    assert source.read(17, 18).tobytes() == x[17:18].tobytes()
    assert source.gather(np.array([3, 50, 100]))[0].tobytes() == x[[3, 50, 100]].tobytes()
    source.close()
    with pytest.raises(DataError):
        source.read(0, 1)


def test_memory_holds_one_item_at_a_time():
    alive = []

    def items():
        for _ in range(5):
            assert sum(ref() is not None for ref in alive) <= 1
            item = X.copy()
            alive.append(weakref.ref(item))
            yield item
            del item

    SpooledSource(items()).close()


def test_narrow_items_are_widened_to_the_first():
    source = SpooledSource([X.astype(np.float64), X, (X * 10).astype(np.int8)])
    assert source.dtype == np.float64
    assert np.array_equal(source.read(101, 202), X)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "iterator: gave no rows"),
        ([X[:0]], "iterator: gave no rows"),
        ([X, X[:, :2]], "item 1 of the iterator: has 2 features and those before it 3"),
        ([X, X[0]], "item 1 of the iterator: array: must be two-dimensional"),
        ([X, X.astype(np.float64)], "item 1 of the iterator: holds float64, which does not fit in the float32"),
        ([X, X.astype(ml_dtypes.bfloat16)], "item 1 of the iterator: holds bfloat16"),
        ([X.astype(ml_dtypes.bfloat16), X.astype(np.float16)], "holds float16, which does not fit in the bfloat16"),
        ([X, None], "item 1 of the iterator"),
        ([X, "missing.npy"], "item 1 of the iterator: missing.npy: no such file"),
    ],
)
def test_what_cannot_be_spooled(items, message):
    with pytest.raises(DataError, match=message):
        SpooledSource(iter(items))


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"iterator's rows cannot be kept there .* TMPDIR"):
        SpooledSource([X], tmp_path / "missing")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_named(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "w+b", buffering=0))  # noqa: PTH123, SIM115
    with pytest.raises(DataError, match=r"cannot be kept there \(No space left on device\); free some space"):
        SpooledSource([X])


def test_no_descriptor_is_left(tmp_path):
    def open_files():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = open_files()
    source = SpooledSource([X], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before + 1
    del source
    assert open_files() == before
