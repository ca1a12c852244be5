"""Each query's true nearest neighbours: computed exactly in one pass, or read in the benchmarks' formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.errors import DataError, RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.bfloat16 import values
from streamgmm.io.plan import Span, plan_chunks, round_chunk_rows
from streamgmm.io.ring import Ring
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source
from streamgmm.seeding import check_finite

_SPARE = 16
"""Neighbours kept beyond k in float32, from which the k are chosen in fp64."""

_TILE_BYTES = 64 << 20
_QUERIES = 1024
_CHUNK_BYTES = 32 << 20

NO_ROW = -1
"""Behind the last neighbour of a query that has fewer than k."""

RAW_SUFFIXES = (".bin", ".ibin")
COUNTS = np.dtype("<u4")


def exact_neighbours(source: Source, queries: NDArray[Any], k: int, settings: InferenceSettings) -> NDArray[np.int64]:
    """Row numbers of the ``k`` nearest rows of each query, (Q, k), nearest first; ties go to the lower number.

    One streamed pass in float32 about the queries' mean keeps k + 16; those are compared in fp64. Fewer than k rows
    leave -1 behind the last.

    Raises
    ------
    RequestError
        Dimensions disagree.
    DataError
        A row or a query holds NaN or infinity.
    """
    n, d = source.shape
    if queries.ndim != 2 or queries.shape[1] != d:
        raise RequestError(f"queries must have shape (Q, {d}) as {source.name} has; got {queries.shape}")
    if not np.isfinite(queries).all():
        row = int(np.flatnonzero(~np.isfinite(queries).all(1))[0])
        raise DataError(f"queries: query {row} holds NaN or infinity; leave it out")
    if not len(queries):
        raise RequestError("queries holds none; give at least one")
    exact = torch.as_tensor(np.asarray(queries, np.float64), device=settings.device)
    shift = exact.mean(0)
    x = (exact - shift).float()
    kept = min(n, k + _SPARE)
    best = torch.full((len(x), kept), torch.inf, device=x.device)
    rows_of = torch.full((len(x), kept), NO_ROW, dtype=torch.int64, device=x.device)
    chunk = round_chunk_rows(max(1024, _CHUNK_BYTES // (4 * d)), 1024)
    tile = max(1024, _TILE_BYTES // (4 * min(len(x), _QUERIES)))
    with Ring(source, chunk, settings.device, settings.threads) as ring:
        for part in ring.stream(plan_chunks(n, chunk)):
            if not torch.isfinite(part.rows.double().sum()):
                _explain(source, part.span)
            for first in range(0, len(part.rows), tile):
                rows = (part.rows[first : first + tile].double() - shift).float()
                norms = (rows**2).sum(1)
                for q in range(0, len(x), _QUERIES):
                    own = slice(q, q + _QUERIES)
                    _keep_best(
                        best[own], rows_of[own], torch.addmm(norms, x[own], rows.T, alpha=-2), part.span.start + first
                    )
    return _settled(source, exact.cpu().numpy(), rows_of.cpu().numpy(), k)


def checked_truth(truth: NDArray[Any], n_queries: int, n_rows: int, k: int) -> NDArray[np.int64]:
    """The first ``k`` columns of ``truth`` (Q, k or more): row numbers, or -1.

    Raises
    ------
    RequestError
        It is of other queries or other data.
    """
    if truth.ndim != 2 or truth.shape[0] != n_queries or truth.shape[1] < k or truth.dtype.kind not in "iu":
        raise RequestError(
            f"truth must be whole numbers of shape ({n_queries}, {k}); got {truth.dtype} of shape {truth.shape}"
        )
    truth = truth[:, :k].astype(np.int64)
    if truth.size and (truth.min() < NO_ROW or truth.max() >= n_rows):
        raise RequestError(f"truth names row {truth.max()}, and the data has {n_rows}; give the truth of this data")
    return truth


def _explain(source: Source, span: Span) -> None:
    """Raise DataError where a row is not finite; a sum of huge numbers alone is no error."""
    check_finite(source, source.read(span.start, span.stop), np.arange(span.start, span.stop))


def _keep_best(best: Tensor, rows_of: Tensor, distances: Tensor, first: int) -> None:
    """Update the smallest ``distances`` (Q, n) seen so far, in place."""
    near, position = distances.topk(min(best.shape[1], distances.shape[1]), largest=False)
    joined = torch.cat([best, near], 1)
    numbers = torch.cat([rows_of, position + first], 1)
    kept = joined.topk(best.shape[1], largest=False)
    best.copy_(kept.values)
    rows_of.copy_(numbers.gather(1, kept.indices))


def _settled(source: Source, queries: NDArray[np.float64], candidates: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    wanted = np.unique(candidates)
    rows: NDArray[np.float32] = np.asarray(values(source.gather(wanted)[0]))
    out: NDArray[np.int64] = np.full((len(queries), k), NO_ROW, np.int64)
    for i, (query, own) in enumerate(zip(queries, candidates, strict=True)):
        own = np.sort(own)
        near = rows[np.searchsorted(wanted, own)].astype(np.float64)
        chosen = own[np.argsort(((near - query) ** 2).sum(1), kind="stable")][:k]
        out[i, : len(chosen)] = chosen
    return out


def read_truth(path: str | os.PathLike[str], n_queries: int, n_rows: int, k: int) -> NDArray[np.int64]:
    """The first ``k`` neighbours of each query, (Q, k) int64, from a benchmark's file.

    ``.ivecs`` (TEXMEX); ``.bin`` and ``.ibin`` of the big-ann benchmarks: two counts, then ids, then perhaps distances;
    anything else that `open_source` reads, such as ``glove.hdf5::neighbors`` of ann-benchmarks.

    Raises
    ------
    DataError
        It is damaged, of other queries, names rows that are not there, or fewer than ``k``.
    """
    name = os.fspath(path)
    suffix = Path(name).suffix.lower()
    if suffix in (".ivecs", *RAW_SUFFIXES):
        try:
            raw = np.fromfile(name, "<i4")
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror}); check the path") from None
        found = (_ivecs(name, raw) if suffix == ".ivecs" else _counted(name, raw)).astype(np.int64)
    else:
        source = open_source(name)
        read = values(source.read(0, source.shape[0]))
        found = read.astype(np.int64)
        if not (found == read).all():
            raise DataError(f"{name}: holds numbers that are no row numbers; give the neighbours, not their distances")
    if len(found) != n_queries:
        raise DataError(f"{name}: is of {len(found)} queries, and there are {n_queries}; give matching files")
    if found.shape[1] < k:
        raise DataError(f"{name}: names {found.shape[1]} neighbours a query, and {k} are needed; lower k")
    found = found[:, :k]
    if found.min() < 0 or found.max() >= n_rows:
        raise DataError(f"{name}: names row {found.max()}, and the data has {n_rows}; give the truth of this data")
    return found


def _ivecs(name: str, raw: NDArray[np.int32]) -> NDArray[np.int32]:
    count = int(raw[0]) if len(raw) else 0
    if count < 1 or len(raw) % (count + 1) or (raw.reshape(-1, count + 1)[:, 0] != count).any():
        raise DataError(f"{name}: is no ivecs file of rows of equal length; restore it")
    return raw.reshape(-1, count + 1)[:, 1:]


def _counted(name: str, raw: NDArray[np.int32]) -> NDArray[np.int32]:
    queries, neighbours = (int(count) for count in raw[:2].view(COUNTS)) if len(raw) >= 2 else (0, 0)
    size = queries * neighbours
    if size < 1 or len(raw) - 2 not in (size, 2 * size):
        raise DataError(f"{name}: its size does not fit its counts ({queries} × {neighbours}); restore it")
    return raw[2 : 2 + size].reshape(queries, neighbours)
