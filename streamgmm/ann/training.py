"""Centroids trained for an index: on all rows or on a sample, and, if wanted, with lists of more equal length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.nearest import Centroids, stream_nearest
from streamgmm.ann.postings import imbalance
from streamgmm.ann.quantizer import Quantizer, quantizer_of_centroids
from streamgmm.errors import RequestError
from streamgmm.fitting import fit
from streamgmm.inference import InferenceSettings
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.request import FitRequest
from streamgmm.seeding import uniform_rows

_ITERATIONS = 25
_BALANCING_PASSES = 8
_MOST_BALANCE = 0.5
_CANDIDATES = 8
_STEP = 0.5
"""Of the way to the wanted penalty, each pass: the whole way makes lists swing."""


def train_quantizer(
    data: Any,
    n_lists: int,
    *,
    sample: int | None = None,
    balance: float = 0.0,
    seed: int = 0,
    max_iter: int = _ITERATIONS,
    settings: InferenceSettings | None = None,
) -> Quantizer:
    """k-means centroids for an index.

    Parameters
    ----------
    sample : int, optional
        Rows to train on, chosen evenly at random; None: all of them, streamed.
    balance : float
        0 is k-means. Above, distances to a centroid are raised by ``balance`` times its list's mean squared distance
        times log(the list's length over the mean length), in eight more passes: 0.1 is mild, 0.3 strong. Of these, the
        centroids are kept with which lists of nearest vectors, as ever, are the most equal in length.

    Raises
    ------
    RequestError
        More lists than rows, or ``balance`` is not between 0 and 0.5.
    """
    if not 0 <= balance <= _MOST_BALANCE:
        raise RequestError(f"balance must be between 0 and {_MOST_BALANCE}; got {balance}")
    source = open_source(data)
    settings = settings or InferenceSettings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if sample is not None:
        source = _sampled(source, max(sample, n_lists), seed)
        settings = replace(settings, memory_limit=None)
    request = FitRequest(
        n_lists,
        "spherical",
        tol=1e-4,
        max_iter=max_iter,
        seed=seed,
        model="kmeans",
        device=str(settings.device),
        memory_limit=settings.memory_limit,
        chunk_rows=settings.chunk_rows,
        threads=settings.threads,
    )
    quantizer = _hard(fit(source, request).mixture)
    return balanced(source, quantizer, balance, settings) if balance else quantizer


def balanced(source: Source, quantizer: Quantizer, balance: float, settings: InferenceSettings) -> Quantizer:
    """The centroids with the most equal lists among those of penalised Lloyd passes from ``quantizer``'s."""
    best, least = quantizer, float("inf")
    biases = np.zeros(quantizer.n_lists)
    for _ in range(_BALANCING_PASSES + 1):
        found = _assigned(source, quantizer, biases, settings)
        if (unequal := imbalance(found.plain)) < least:
            best, least = quantizer, unequal
        counts = np.maximum(found.counts, 1)
        radii = np.where(found.counts > 0, found.spread / counts, found.spread.sum() / source.shape[0])
        means = np.where(found.counts[:, None] > 0, found.sums / counts[:, None], quantizer.centroids.astype(float))
        # As if each list had a row more: an empty one is to be preferred, not infinitely.
        wanted = balance * radii * np.log((found.counts + 1) / (found.counts.mean() + 1))
        biases = biases + _STEP * (wanted - biases)
        quantizer = quantizer_of_centroids(means)
    return best


@dataclass(frozen=True, eq=False)
class _Assigned:
    """Rows by their nearest centroid with biases; ``plain`` counts them by the nearest without.

    ``counts`` (K,), ``sums`` (K, D), ``spread`` (K,) sums of squared distances, ``plain`` (K,).
    """

    counts: Float64Array
    sums: Float64Array
    spread: Float64Array
    plain: NDArray[np.int64]


def _assigned(source: Source, quantizer: Quantizer, biases: Float64Array, settings: InferenceSettings) -> _Assigned:
    k, d = quantizer.centroids.shape
    device = settings.device
    shift = Centroids.of(quantizer.centroids, device).shift
    counts, spread, plain = (torch.zeros(k, dtype=torch.float64, device=device) for _ in range(3))
    sums = torch.zeros((k, d), dtype=torch.float64, device=device)
    offered = torch.as_tensor(biases, device=device)
    for part in stream_nearest(source, quantizer, _CANDIDATES, settings):
        near = part.candidates
        chosen = (near.distances + offered[near.lists]).argmin(1, keepdim=True)
        lists = near.lists.gather(1, chosen)[:, 0]
        counts += torch.bincount(lists, minlength=k)
        plain += torch.bincount(near.lists[:, 0], minlength=k)
        sums.index_add_(0, lists, part.rows.double() - shift)
        spread.index_add_(0, lists, near.distances.gather(1, chosen)[:, 0].double())
    total = counts.cpu().numpy()
    about_zero = sums.cpu().numpy() + total[:, None] * shift.cpu().numpy()
    return _Assigned(total, about_zero, spread.cpu().numpy(), plain.cpu().numpy().astype(np.int64))


def _hard(mixture: Mixture) -> Quantizer:
    return quantizer_of_centroids(mixture.means)


def _sampled(source: Source, rows: int, seed: int) -> Source:
    chosen = uniform_rows(source.shape[0], min(rows, source.shape[0]), np.random.default_rng(seed))
    return open_source(values(source.gather(chosen)[0]))
