"""Tables of lists, a row a vector, held in memory: what an evaluation looks things up in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.nearest import stream_nearest
from streamgmm.ann.placement import assignments
from streamgmm.ann.policies import NO_LIST, Policy, lists_of
from streamgmm.ann.postings import PostingLists
from streamgmm.ann.quantizer import Quantizer
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources.base import Source
from streamgmm.mixture import Float64Array

Table = NDArray[np.int32]
"""(N, C): the lists of each vector, -1 behind the last."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Every vector's lists under several policies over one quantizer.

    Attributes
    ----------
    tables : list of (N, C) arrays
        In the order of the policies.
    radii : (K,) array
        Mean squared distance of the vectors nearest to each centroid to it.
    """

    quantizer: Quantizer
    tables: list[Table]
    radii: Float64Array


def lay_out(source: Source, quantizer: Quantizer, policies: Sequence[Policy], settings: InferenceSettings) -> Layout:
    """One pass for all policies that need distances only, and one for each ``resp``. Raises as `assign`."""
    pieces: dict[Policy, list[Table]] = {policy: [] for policy in policies}
    near = [policy for policy in pieces if policy.name != "resp"]
    for policy in pieces:
        if policy.name == "resp":
            pieces[policy] = [part.lists for part in assignments(source, quantizer, policy, 1.0, settings)]
    totals, counts = (torch.zeros(quantizer.n_lists, dtype=torch.float64, device=settings.device) for _ in range(2))
    most = max((policy.candidates for policy in near if policy.width > 1), default=1)
    for part in stream_nearest(source, quantizer, most, settings):
        first = part.candidates.lists[:, 0]
        totals.index_add_(0, first, part.candidates.distances[:, 0].double())
        counts += torch.bincount(first, minlength=quantizer.n_lists)
        for policy in near:
            pieces[policy].append(lists_of(part.candidates, policy).cpu().numpy())
    radii = (totals / counts.clamp(min=1)).cpu().numpy()
    # A list that is nearest to nothing has no radius of its own.
    radii = np.where(counts.cpu().numpy() > 0, radii, radii.mean())
    return Layout(quantizer, [np.concatenate(pieces[policy]) for policy in policies], radii)


def sizes_of(table: Table, n_lists: int) -> NDArray[np.int64]:
    """Entries of each list, (K,)."""
    return np.bincount(table[table != NO_LIST], minlength=n_lists)


def copies_of(table: Table) -> float:
    """Lists a vector, on average."""
    return float((table != NO_LIST).sum() / len(table))


def postings_of(quantizer: Quantizer, table: Table) -> PostingLists:
    """Posting lists of row numbers, in memory."""
    row, column = np.nonzero(table != NO_LIST)
    order = np.argsort(table[row, column], kind="stable")
    offsets = np.concatenate([[0], np.cumsum(sizes_of(table, quantizer.n_lists))]).astype(np.int64)
    facts = {"n_samples": len(table), "max_copies": table.shape[1]}
    return PostingLists(quantizer.centroids, offsets, row[order].astype(np.int64), None, facts)
