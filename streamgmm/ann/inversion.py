"""From the table of lists, a row a vector, to posting lists: a counting sort that holds a bounded part of the entries.

One reading counts. Ranges of lists are then chosen whose entries fit; a second reading deals the entries out to a file
a range; and range by range they are sorted by list and written behind one another. Both readings go in the order of
the rows and the sort is stable, so entries of a list stay in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.spill import Spill
from streamgmm.io.sinks import open_sink
from streamgmm.storage import naming

_ENTRY = {
    False: np.dtype([("list", "<i4"), ("id", "<i8")]),
    True: np.dtype([("list", "<i4"), ("id", "<i8"), ("resp", "<f4")]),
}

_SORT_COPIES = 4
"""Of a range's entries while they are sorted: read, order, sorted, and what is written."""

_MOST_RANGES = 512
"""Files open at once."""

INT64 = np.dtype(np.int64)
FLOAT32 = np.dtype(np.float32)


def invert(
    spill: Spill, n_lists: int, ids: NDArray[np.int64] | None, folder: Path, scratch: Path, budget: int
) -> NDArray[np.int64]:
    """Write ``ids.npy`` and, where the table has them, ``resp.npy`` to ``folder``; gives the offsets (K + 1,).

    Parameters
    ----------
    ids : (N,) int64 array or None
        The id of each row; None: the number of the row.
    scratch : Path
        A folder for the files of the ranges.
    budget : int
        Bytes of entries held at once. A single list that is longer is copied through, since it needs no sorting.
    """
    block = max(1024, budget // (_SORT_COPIES * spill.columns * 16))
    sizes = np.zeros(n_lists, np.int64)
    with_resp = False
    for _, lists, resp in spill.blocks(block):
        sizes += np.bincount(lists[lists >= 0], minlength=n_lists)
        with_resp = resp is not None
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    entry = _ENTRY[with_resp]
    firsts = ranges(sizes, max(1, budget // (_SORT_COPIES * entry.itemsize)))
    total = int(offsets[-1])
    with ExitStack() as stack:
        id_sink = stack.enter_context(open_sink(folder / "ids.npy", (total,), INT64, overwrite=True))
        resp_sink = None
        if with_resp:
            resp_sink = stack.enter_context(open_sink(folder / "resp.npy", (total,), FLOAT32, overwrite=True))
        for entries in _in_order(spill, ids, firsts, sizes, scratch, block, entry):
            id_sink.write(entries["id"])
            if resp_sink is not None:
                resp_sink.write(entries["resp"])
    return offsets


def ranges(sizes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """First lists of ranges of lists with at most ``most`` entries each, or of a single list; at most 512 ranges."""
    most = max(most, -(-int(sizes.sum()) // (_MOST_RANGES // 2)))
    firsts, held = [0], 0
    for k, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            firsts.append(k)
            held = 0
        held += size
    return np.array(firsts, np.int64)


def _in_order(
    spill: Spill,
    ids: NDArray[np.int64] | None,
    firsts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    scratch: Path,
    block: int,
    entry: np.dtype[np.void],
) -> Iterator[np.ndarray]:
    """Entries by list, within a list by row, a bounded number at a time."""
    paths = [scratch / f"range{i}" for i in range(len(firsts))]
    with ExitStack() as stack:
        files: list[BinaryIO] = [stack.enter_context(path.open("w+b")) for path in paths]
        for start, lists, resp in spill.blocks(block):
            _deal(_entries(start, lists, resp, ids, entry), firsts, files, paths)
        for number, (file, path) in enumerate(zip(files, paths, strict=True)):
            file.flush()
            last = firsts[number + 1] if number + 1 < len(firsts) else len(sizes)
            alone = last - firsts[number] == 1
            rows = block if alone else -1
            file.seek(0)
            while len(entries := np.fromfile(file, entry, rows)):
                yield entries if alone else entries[np.argsort(entries["list"], kind="stable")]
            path.unlink()


def _entries(
    start: int,
    lists: NDArray[np.int32],
    resp: NDArray[np.float32] | None,
    ids: NDArray[np.int64] | None,
    entry: np.dtype[np.void],
) -> np.ndarray:
    kept = lists >= 0
    entries: np.ndarray = np.empty(int(kept.sum()), entry)
    own = np.arange(start, start + len(lists)) if ids is None else ids[start : start + len(lists)]
    entries["list"] = lists[kept]
    entries["id"] = np.broadcast_to(own[:, None], lists.shape)[kept]
    if resp is not None:
        entries["resp"] = resp[kept]
    return entries


def _deal(entries: np.ndarray, firsts: NDArray[np.int64], files: list[BinaryIO], paths: list[Path]) -> None:
    number = np.searchsorted(firsts, entries["list"], side="right") - 1
    order = np.argsort(number, kind="stable")
    cuts = np.searchsorted(number[order], np.arange(len(files) + 1))
    for i in np.flatnonzero(np.diff(cuts)):
        with naming(paths[i]):
            files[i].write(entries[order[cuts[i] : cuts[i + 1]]].data)
