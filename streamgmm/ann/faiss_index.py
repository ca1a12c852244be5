"""faiss indexes with our centroids and our lists, in memory or on disk.

faiss is imported when an index is made or opened: `pip install streamgmm[faiss]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.assignment import Progress
from streamgmm.ann.coding import SCALAR_BITS, Coding
from streamgmm.ann.placement import Assigned, assignments, check, settle
from streamgmm.ann.policies import NO_LIST, Policy
from streamgmm.ann.postings import PostingLists
from streamgmm.ann.quantizer import Quantizer, quantizer_of, quantizer_of_centroids
from streamgmm.errors import DamagedFileError, RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.bfloat16 import as_tensor, values
from streamgmm.io.optional import require
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source
from streamgmm.seeding import check_finite, uniform_rows

_PIECE_ROWS = 16_384
_TRAINING_ROWS = 65_536
_PQ_LEAST_ROWS = 39
"""Rows that a codeword is trained on at least; faiss's own number."""


@dataclass(frozen=True)
class IndexFacts:
    """What an index does not say of itself; kept beside it as ``OUT.json``.

    Attributes
    ----------
    max_copies : int
        Lists that one vector is in at most.
    n_samples : int
        Vectors, each counted once.
    """

    max_copies: int
    n_samples: int
    digest: str = ""
    policy: str = ""
    kind: str = "flat"


def build_index(
    source: Any,
    model: Any,
    policy: Policy | str | None = None,
    *,
    copies: float | None = None,
    temperature: float = 1.0,
    coding: Coding | None = None,
    ids: NDArray[np.int64] | None = None,
    settings: InferenceSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Any, IndexFacts]:
    """A ``faiss.IndexIVF…`` over every row of ``source``, in memory, in one streamed pass; see `assign` for the rest.

    ``model`` may also be `PostingLists` whose ids are row numbers: their lists are then used as they are.

    Raises as `assign`; RequestError too where faiss is not installed or the coding does not fit the data.
    """
    job = index_job(source, model, policy, copies, temperature, coding, ids, settings)
    index = job.empty()
    for part in job.parts():
        put(index, part, ids)
        if progress is not None:
            progress(len(part.lists))
    return index, job.facts


def centroids_of(index: Any) -> Quantizer:
    """The centroids of a faiss IVF index, to be used as any others."""
    quantizer = index.quantizer
    return quantizer_of_centroids(quantizer.reconstruct_n(0, quantizer.ntotal).astype(np.float64))


@dataclass(frozen=True, eq=False)
class IndexJob:
    """A request that was found possible."""

    source: Source
    quantizer: Quantizer
    policy: Policy
    coding: Coding
    temperature: float
    settings: InferenceSettings
    postings: PostingLists | None
    facts: IndexFacts

    def parts(self) -> Iterator[Assigned]:
        """Every row with its lists, in order."""
        if self.postings is not None:
            yield from _as_stored(self.source, self.postings)
            return
        asked = (self.source, self.quantizer, self.policy, self.temperature, self.settings)
        for part in assignments(*asked, with_rows=True):
            if part.rows is None:
                # Responsibilities come without their rows: these are read again, from the page cache as a rule.
                rows = as_tensor(self.source.read(part.start, part.start + len(part.lists)))
                yield replace(part, rows=rows)
            else:
                yield part

    def empty(self) -> Any:
        """The index before it holds a vector, its codes trained."""
        faiss = import_faiss(self.source.name)
        k, d = self.quantizer.centroids.shape
        coarse = faiss.IndexFlatL2(d)
        coarse.add(self.quantizer.centroids)
        if self.coding.kind == "flat":
            index = faiss.IndexIVFFlat(coarse, d, k)
        elif self.coding.kind == "pq":
            index = faiss.IndexIVFPQ(coarse, d, k, self.coding.subspaces_of(d), self.coding.bits)
            index.pq.cp.min_points_per_centroid = 1
        else:
            types = dict(zip(SCALAR_BITS, ("QT_4bit", "QT_6bit", "QT_8bit", "QT_fp16"), strict=True))
            kind = getattr(faiss.ScalarQuantizer, types[self.coding.bits])
            index = faiss.IndexIVFScalarQuantizer(coarse, d, k, kind)
        # Python's reference would go with this function.
        index.own_fields = True
        coarse.this.disown()
        if not index.is_trained:
            index.train(self._training_rows())
        return index

    def _training_rows(self) -> NDArray[np.float32]:
        n = self.source.shape[0]
        codewords = 1 << self.coding.bits if self.coding.kind == "pq" else 1
        if n < codewords:
            raise RequestError(
                f"pq with {self.coding.bits} bits has {codewords} codewords and {self.source.name} only {n} rows; "
                "use fewer bits, or kind sq or flat"
            )
        wanted = max(_TRAINING_ROWS, _PQ_LEAST_ROWS * codewords)
        chosen = uniform_rows(n, min(n, wanted), np.random.default_rng(0))
        rows, _ = self.source.gather(chosen)
        check_finite(self.source, rows, chosen)
        return np.ascontiguousarray(values(rows), dtype=np.float32)


def index_job(
    source: Any,
    model: Any,
    policy: Policy | str | None,
    copies: float | None,
    temperature: float,
    coding: Coding | None,
    ids: NDArray[np.int64] | None,
    settings: InferenceSettings | None,
) -> IndexJob:
    source, coding = open_source(source), coding or Coding()
    import_faiss(source.name)
    settings = settings or InferenceSettings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    postings = model if isinstance(model, PostingLists) else None
    if postings is not None:
        if policy is not None or copies is not None:
            raise RequestError("the lists are given, so policy and copies are settled; leave them out, or give a model")
        if postings.facts.get("own_ids"):
            raise RequestError("the lists hold ids of their own, not row numbers; give the model instead, and the ids")
        if postings.facts.get("n_samples", source.shape[0]) != source.shape[0]:
            raise RequestError(
                f"the lists were made from {postings.facts['n_samples']} rows and {source.name} has {source.shape[0]}; "
                "give the same data"
            )
        quantizer = quantizer_of_centroids(postings.centroids)
        policy = Policy("top1")
    else:
        quantizer = quantizer_of(model)
        policy = Policy(policy) if isinstance(policy, str) else policy or Policy()
    check(source, quantizer, policy, ids)
    coding.subspaces_of(source.shape[1])
    if postings is None:
        policy = settle(source, quantizer, policy, copies, temperature, settings)
    facts = IndexFacts(
        policy.columns(quantizer.n_lists) if postings is None else postings.max_copies,
        source.shape[0],
        quantizer.digest,
        policy.name if postings is None else str(dict(postings.facts.get("policy", {})).get("name", "given")),
        coding.kind,
    )
    return IndexJob(source, quantizer, policy, coding, temperature, settings, postings, facts)


def put(index: Any, part: Assigned, ids: NDArray[np.int64] | None) -> int:
    """Put rows into their lists; gives the number of entries. Entries of a list are in the order of the rows."""
    assert part.rows is not None
    faiss = import_faiss("index")
    entries = 0
    for first in range(0, len(part.lists), _PIECE_ROWS):
        lists = part.lists[first : first + _PIECE_ROWS]
        x = part.rows[first : first + _PIECE_ROWS].float().cpu().numpy()
        row, column = np.nonzero(lists != NO_LIST)
        numbers = part.start + first + row
        own = numbers.astype(np.int64) if ids is None else np.ascontiguousarray(ids[numbers])
        x, where = np.ascontiguousarray(x[row]), lists[row, column].astype(np.int64)
        index.add_core(len(x), faiss.swig_ptr(x), faiss.swig_ptr(own), faiss.swig_ptr(where), None)
        entries += len(x)
    return entries


def _as_stored(source: Source, postings: PostingLists) -> Iterator[Assigned]:
    """Rows in the lists that hold their numbers."""
    n = source.shape[0]
    table: NDArray[np.int32] = np.full((n, postings.max_copies), NO_LIST, np.int32)
    filled: NDArray[np.int32] = np.zeros(n, np.int32)
    for k in range(postings.n_lists):
        ids = postings.list_ids(k)
        rising = bool((ids[1:] > ids[:-1]).all())
        if len(ids) and not (rising and ids[0] >= 0 and ids[-1] < n and filled[ids].max() < table.shape[1]):
            raise DamagedFileError(
                f"list {k} holds rows that are not there, or too often; run assign again with --overwrite"
            )
        table[ids, filled[ids]] = k
        filled[ids] += 1
    start = 0
    for rows in source.chunks(_PIECE_ROWS):
        stop = start + len(rows)
        check_finite(source, rows, np.arange(start, stop))
        narrow = np.ascontiguousarray(values(rows), dtype=np.float32)
        yield Assigned(start, table[start:stop], None, torch.from_numpy(narrow))
        start = stop


def import_faiss(name: str) -> Any:
    return require("faiss", "faiss", name)
