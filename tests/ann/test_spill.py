from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgmm.ann.column import Column
from streamgmm.ann.spill import Spill
from streamgmm.statistics import BLOCK_ROWS


def rows(n: int, value: int) -> np.ndarray:
    return np.full((n, 2), value, np.int32)


def test_it_goes_on_at_a_block_that_is_safe(tmp_path: Path) -> None:
    with Spill(tmp_path, 3 * BLOCK_ROWS, 2, False, {"a": 1}) as spill:
        spill.append(rows(BLOCK_ROWS + 7, 5), None)
        spill.sync()
        spill.append(rows(BLOCK_ROWS, 6), None)
    with Spill(tmp_path, 3 * BLOCK_ROWS, 2, False, {"a": 1}) as spill:
        assert spill.resumed
        assert spill.rows == BLOCK_ROWS
        spill.append(rows(2, 8), None)
        lists, resp = spill.read(BLOCK_ROWS - 1, 100)
        assert resp is None
        assert lists.tolist() == [[5, 5], [8, 8], [8, 8]]


def test_rows_that_others_wrote_over_are_not_gone_on_with(tmp_path: Path) -> None:
    """A kill before the second's rows are safe must not leave the first's word for them."""
    n = 4 * BLOCK_ROWS
    with Spill(tmp_path, n, 2, False, {"a": 1}) as spill:
        spill.append(rows(2 * BLOCK_ROWS, 1), None)
        spill.sync()
    with Spill(tmp_path, n, 2, False, {"a": 2}) as spill:
        assert not spill.resumed
        spill.append(rows(3 * BLOCK_ROWS, 2), None)
    with Spill(tmp_path, n, 2, False, {"a": 1}) as spill:
        assert spill.rows == 0


@pytest.mark.parametrize("state", ["", "{", "[]", '{"identity": {"a": 1}}', '{"identity": {"a": 1}, "rows": 1e99}'])
def test_a_state_that_says_nothing(tmp_path: Path, state: str) -> None:
    (tmp_path / "lists").write_bytes(bytes(1 << 20))
    (tmp_path / "state.json").write_text(state)
    with Spill(tmp_path, 100, 2, False, {"a": 1}) as spill:
        assert spill.rows == 0


def test_columns_are_read_and_written_in_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    """The system may take and give less than it was asked for."""
    column = Column(tmp_path / "c", np.int64)
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:13], offset))
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: read(file, [views[0][:11]], offset))
    values = np.arange(100) * (1 << 50)
    column.write(3, values[::2])
    column.write(60, values[:0])
    np.testing.assert_array_equal(column.read(4, 49), values[2::2])
    with pytest.raises(OSError, match="ended early") as caught:
        column.read(50, 10)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(tmp_path / "c")
    column.close()
