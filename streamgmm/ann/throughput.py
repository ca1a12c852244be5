"""How fast faiss answers, on one thread, with each vector's copies removed."""

from __future__ import annotations

import time
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.layout import Table, postings_of
from streamgmm.ann.probing import Probing
from streamgmm.ann.quantizer import Quantizer
from streamgmm.io.sources.base import Source

_LARGEST_BYTES = 4 << 30
"""A larger index is not built for this."""

_QUERIES = 500
_ROUNDS = 3


def queries_per_second(
    source: Source, quantizer: Quantizer, table: Table, probing: Probing, queries: NDArray[np.float32], k: int
) -> float | None:
    """The best of three rounds; None where faiss is missing or the index would be too large."""
    n, d = source.shape
    if find_spec("faiss") is None or (table >= 0).sum() * (4 * d + 8) > _LARGEST_BYTES:
        return None
    import faiss

    from streamgmm.ann.faiss_index import build_index
    from streamgmm.ann.search import Searcher

    searcher = Searcher(*build_index(source, postings_of(quantizer, table)))
    asked, times = queries[:_QUERIES], []
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            searcher.search(asked, min(k, n), probing, quantizer)
            times.append(time.perf_counter() - begun)
    finally:
        faiss.omp_set_num_threads(threads)
    return len(asked) / min(times)
