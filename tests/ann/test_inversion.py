from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.ann import inversion
from streamgmm.ann.inversion import invert, ranges, share
from streamgmm.ann.policies import NO_LIST
from streamgmm.ann.spill import Spill
from streamgmm.errors import RequestError


def table_of(n: int, columns: int, k: int, skew: float, seed: int) -> np.ndarray:
    """Lists of ``n`` rows, the first of each always there; with ``skew`` most are list 0 or the last."""
    rng = np.random.default_rng(seed)
    lists = rng.integers(0, k, (n, columns)).astype(np.int32)
    lists[rng.random((n, columns)) < skew] = rng.choice([0, k - 1])
    lists[:, 1:][rng.random((n, columns - 1)) < 0.4] = NO_LIST
    return lists


def inverted(
    lists: np.ndarray, resp: np.ndarray | None, k: int, ids: np.ndarray | None, budget: int, workers: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        with Spill(folder, len(lists), lists.shape[1], resp is not None, {}) as spill:
            spill.append(lists, resp)
            offsets = invert(spill, k, ids, folder / "out", folder, budget, workers)
        written = {path.stem: np.load(path) for path in (folder / "out").iterdir()}
        return offsets, written["ids"], written.get("resp")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 700),
    columns=st.integers(1, 4),
    k=st.sampled_from([1, 2, 7, 255, 256, 257, 70_000]),
    skew=st.sampled_from([0.0, 0.9, 1.0]),
    budget=st.integers(0, 1 << 17),
    workers=st.integers(1, 3),
    with_resp=st.booleans(),
    own_ids=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_as_brute_force(
    n: int,
    columns: int,
    k: int,
    skew: float,
    budget: int,
    workers: int,
    with_resp: bool,
    own_ids: bool,
    seed: int,
) -> None:
    lists = table_of(n, columns, k, skew, seed)
    rng = np.random.default_rng(seed)
    resp = rng.random(lists.shape).astype(np.float32) if with_resp else None
    ids = rng.permutation(n) + (1 << 61) if own_ids else None
    offsets, found, found_resp = inverted(lists, resp, k, ids, budget, workers)
    entries = sorted(
        (int(lists[row, column]), row, column)
        for row in range(n)
        for column in range(columns)
        if lists[row, column] != NO_LIST
    )
    of_list, rows, of_column = (np.array(part) for part in zip(*entries, strict=True))
    np.testing.assert_array_equal(offsets, np.searchsorted(of_list, np.arange(k + 1)))
    np.testing.assert_array_equal(found, rows if ids is None else ids[rows])
    assert (found_resp is None) == (resp is None)
    if resp is not None and found_resp is not None:
        np.testing.assert_array_equal(found_resp, resp[rows, of_column])


def test_many_pieces_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as they are in use, full of entries, and a list longer than a piece."""
    lists = table_of(200_000, 2, 300, 0.3, 0)
    whole = inverted(lists, None, 300, None, 1 << 30, 1)
    monkeypatch.setattr(inversion, "_LEAST_PIECE", 5000)
    parts = inverted(lists, None, 300, None, 1 << 20, 2)
    assert np.diff(whole[0]).max() > 5000
    for one, other in zip(whole[:2], parts[:2], strict=True):
        np.testing.assert_array_equal(one, other)


@given(entries=st.integers(1, 1 << 40), budget=st.integers(1 << 10, 1 << 40), workers=st.integers(1, 64))
def test_threads_share_the_budget(entries: int, budget: int, workers: int) -> None:
    threads, each = share(entries, budget, workers)
    assert 1 <= threads <= workers
    assert each >= 1
    assert (threads + 1) * each * inversion._ENTRY_BYTES <= budget


def test_as_many_threads_as_there_are_where_memory_allows() -> None:
    assert share(200_000_000, 1 << 30, 8)[0] == 8
    assert share(200_000_000, 64 << 20, 8)[0] < 8


def test_ranges_hold_what_they_may() -> None:
    sizes = np.array([5, 0, 3, 9, 1, 1, 1])
    np.testing.assert_array_equal(ranges(sizes, 8), [0, 3, 4])
    np.testing.assert_array_equal(ranges(np.zeros(4, np.int64), 8), [0])


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    class Huge(Spill):
        rows = 1 << 45

        def __init__(self) -> None:
            self.columns, self.with_resp = 1, False

    with pytest.raises(RequestError, match="63 bits; use fewer lists"):
        invert(Huge(), 1 << 20, None, tmp_path, tmp_path, 1 << 20)
