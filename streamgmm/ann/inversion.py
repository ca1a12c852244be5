"""From the table of lists, a row a vector, to posting lists: a radix sort of two digits that holds a bounded part.

One reading counts the entries of each list. Ranges of lists are then chosen whose entries fit; a second reading deals
blocks of rows out to the ranges, whose places in one file the counts tell; and range by range entries are dealt to
their lists and written behind one another. Each step goes over many pieces that fit into processors' caches, and
threads share them. Dealing keeps the order of the rows, so entries of a list stay in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.column import Column
from streamgmm.ann.policies import NO_LIST
from streamgmm.ann.spill import Spill
from streamgmm.errors import RequestError
from streamgmm.io.sinks import open_sink
from streamgmm.parallel import map_in_order

_ENTRY_BYTES = 64
"""Of memory that an entry takes while it is dealt: key, number, order, and each before and after."""

_LEAST_PIECE = 1 << 18
_MOST_PIECES = 512
"""With pieces below both, files would be written in crumbs: there are rather fewer threads."""

INT64 = np.dtype(np.int64)
FLOAT32 = np.dtype(np.float32)

Floats = NDArray[np.float32] | None


def invert(
    spill: Spill,
    n_lists: int,
    ids: NDArray[np.int64] | None,
    folder: Path,
    scratch: Path,
    budget: int,
    workers: int = 1,
) -> NDArray[np.int64]:
    """Write ``ids.npy`` and, where the table has them, ``resp.npy`` to ``folder``; gives the offsets (K + 1,).

    Parameters
    ----------
    ids : (N,) int64 array or None
        The id of each row; None: the number of the row.
    scratch : Path
        A folder for what is dealt out: 8 bytes an entry, 12 with responsibilities.
    budget : int
        Bytes of entries held at once.
    workers : int
        Threads at most. Neither they nor the budget change a bit.

    Raises
    ------
    RequestError
        List and row together need more than 63 bits.
    """
    shift = max(1, (spill.rows - 1).bit_length())
    if n_lists.bit_length() + shift > INT64.itemsize * 8 - 1:
        raise RequestError(f"{n_lists} lists of {spill.rows} rows cannot be numbered in 63 bits; use fewer lists")
    threads, most = share(spill.rows * spill.columns, budget, workers)
    blocks = range(0, spill.rows, max(1, most // spill.columns))
    sizes = np.zeros(n_lists, np.int64)
    for counted in map_in_order(lambda start: _count(spill.read(start, blocks.step)[0], n_lists), blocks, threads):
        sizes += counted
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    firsts = ranges(sizes, most)
    # Looked up: a binary search takes thirty times as long.
    range_of = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=n_lists))
    with ExitStack() as stack:
        keys = stack.enter_context(closing(Column(scratch / "keys", INT64)))
        id_sink = stack.enter_context(open_sink(folder / "ids.npy", (int(offsets[-1]),), INT64, overwrite=True))
        resp = resp_sink = None
        if spill.with_resp:
            resp = stack.enter_context(closing(Column(scratch / "key-resp", FLOAT32)))
            resp_sink = stack.enter_context(
                open_sink(folder / "resp.npy", (int(offsets[-1]),), FLOAT32, overwrite=True)
            )
        places = offsets[firsts]
        for dealt in map_in_order(lambda start: _deal(spill, start, blocks.step, range_of, shift), blocks, threads):
            for number in np.flatnonzero(np.diff(dealt.cuts)):
                own = slice(dealt.cuts[number], dealt.cuts[number + 1])
                keys.write(int(places[number]), dealt.keys[own])
                if resp is not None and dealt.resp is not None:
                    resp.write(int(places[number]), dealt.resp[own])
                places[number] += own.stop - own.start
        pieces = _pieces(firsts, offsets, most)
        for rows, own_resp in map_in_order(lambda piece: _settle(piece, keys, resp, shift, ids), pieces, threads):
            id_sink.write(rows)
            if resp_sink is not None and own_resp is not None:
                resp_sink.write(own_resp)
    return offsets


def share(entries: int, budget: int, workers: int) -> tuple[int, int]:
    """Threads, and the entries that each may hold while as many as there are threads and one more wait."""
    wanted = max(-(-entries // _MOST_PIECES), _LEAST_PIECE)
    threads = min(workers, max(1, budget // (wanted * _ENTRY_BYTES) - 1))
    return threads, max(1, min(wanted, budget // ((threads + 1) * _ENTRY_BYTES)))


def ranges(sizes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """First lists of ranges of lists with at most ``most`` entries each, or of a single list."""
    firsts, held = [0], 0
    for k, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            firsts.append(k)
            held = 0
        held += size
    return np.array(firsts, np.int64)


@dataclass(frozen=True, eq=False)
class _Dealt:
    """Entries by range: those of range r are ``keys[cuts[r]:cuts[r + 1]]``."""

    keys: NDArray[np.int64]
    resp: Floats
    cuts: NDArray[np.int64]


@dataclass(frozen=True)
class _Piece:
    """Entries ``start`` to ``stop``, of lists from ``first`` to before ``last``."""

    start: int
    stop: int
    first: int
    last: int


def _count(lists: NDArray[np.int32], n_lists: int) -> NDArray[np.int64]:
    """Entries of each list, (K,)."""
    return np.bincount(lists.reshape(-1) - NO_LIST, minlength=n_lists + 1)[1:]


def _deal(spill: Spill, start: int, count: int, range_of: NDArray[np.int64], shift: int) -> _Dealt:
    """Keys ``list << shift | row`` of some rows' entries by range of lists, in the order of the rows."""
    table, resp = spill.read(start, count)
    kept = np.flatnonzero(table.reshape(-1) != NO_LIST)
    lists = table.reshape(-1)[kept].astype(np.int64)
    order, cuts = _by_number(range_of[lists], int(range_of[-1]) + 1)
    keys = lists << shift | kept // spill.columns + start
    return _Dealt(keys[order], None if resp is None else resp.reshape(-1)[kept[order]], cuts)


def _pieces(firsts: NDArray[np.int64], offsets: NDArray[np.int64], most: int) -> Iterator[_Piece]:
    """Each range, and a list that is longer than ``most`` a part at a time: it is in order as it is."""
    for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(offsets) - 1], strict=True):
        start, stop = int(offsets[first]), int(offsets[last])
        for part in range(start, stop, most):
            yield _Piece(part, min(part + most, stop), first, last)


def _settle(
    piece: _Piece, keys: Column, resp: Column | None, shift: int, ids: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], Floats]:
    """A piece's ids and responsibilities, by list."""
    count = piece.stop - piece.start
    own = keys.read(piece.start, count)
    order, _ = _by_number((own >> shift) - piece.first, piece.last - piece.first)
    rows = own[order] & (1 << shift) - 1
    return rows if ids is None else ids[rows], None if resp is None else resp.read(piece.start, count)[order]


def _by_number(numbers: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order that sorts ``numbers``, stably, and where each of ``count`` numbers begins and the last ends."""
    # NumPy sorts 8 and 16 bits by radix, many times faster than 64 by merging.
    narrow = numbers.astype(np.min_scalar_type(max(count - 1, 0)), copy=False)
    cuts = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=count))])
    return np.argsort(narrow, kind="stable"), cuts
