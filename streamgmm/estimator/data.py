"""What ``X`` may be: arrays as scikit-learn checks them, and everything that streams."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import _check_sample_weight, validate_data

from streamgmm.errors import RequestError
from streamgmm.exact import exact_sum
from streamgmm.io.bfloat16 import BFLOAT16
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.instances import is_dask, is_zarr_array, is_zarr_group
from streamgmm.io.sources.spooled import SpooledSource
from streamgmm.weighting import Weighting, open_weights

_WEIGHTS_AT_ONCE = 1 << 16


@contextmanager
def rows_of(
    estimator: Any, X: Any, *, reset: bool, ensure_min_samples: int = 1, client: Any = None
) -> Iterator[Source]:
    """The rows of ``X``; ``n_features_in_`` and feature names noted (``reset``) or compared.

    Arrays, lists and data frames in memory are checked in full, with scikit-learn's messages. Paths, memory maps,
    ``zarr``, Dask, torch, and lists of those are checked as they stream; an iterator of arrays is spooled first, and so
    is a Dask array that is fitted (``reset``): each partition computed once, by Dask's workers, or by ``client``'s.

    Raises
    ------
    ValueError
        As `sklearn.utils.validation.validate_data`, or a DataError.
    """
    if is_iterator(X):
        source: Source = SpooledSource(X)
    elif reset and is_dask(X):
        # Whoever holds a Dask array has imported Dask. A fit passes over the rows many times.
        from streamgmm.prepare.spilling import SpilledSource

        source = SpilledSource(X, client=client)
    elif is_streamed(X):
        source = open_source(X)
    else:
        # What is left here is in memory; its type is kept, for rows are converted as they stream.
        source = open_source(validate_data(estimator, X, reset=reset, ensure_min_samples=ensure_min_samples))
        yield source
        return
    try:
        validate_data(estimator, source, reset=reset, skip_check_array=True)
        yield source
    finally:
        if source is not X and (isinstance(source, SpooledSource) or (reset and is_dask(X))):
            source.close()


def weights_of(sample_weight: Any, source: Source) -> Source | None:
    """``sample_weight`` (N,), an array or a file of N values, as a source; None where there is none.

    Raises
    ------
    ValueError
        Not one value a row, or, of an array, a negative one; those of a file are looked at as they stream.
    """
    if sample_weight is None:
        return None
    if not is_streamed(sample_weight):
        rows = np.broadcast_to(np.float64(0), (source.shape[0], 1))  # of which only the number is looked at
        sample_weight = _check_sample_weight(sample_weight, rows, ensure_non_negative=True)
    return open_weights(sample_weight, source.shape[0])


def weighted_mean(pieces: Iterable[np.ndarray], weighting: Weighting, n: int) -> float:
    """Σwx / Σw of ``n`` rows' values, which come in ``pieces``; both sums are exact, however the pieces were cut.

    Raises
    ------
    RequestError
        All weights are zero.
    """
    total = total_weight(weighting, n)
    if total == 0:
        raise RequestError("sample_weight is zero for every row; give at least one positive weight")
    return weighted_sum(pieces, weighting) / total


def total_weight(weighting: Weighting, n: int) -> float:
    """Σw of ``n`` rows, exact."""
    cuts = range(0, n, _WEIGHTS_AT_ONCE)
    return weighted_sum((np.ones(min(_WEIGHTS_AT_ONCE, n - start)) for start in cuts), weighting)


def weighted_sum(pieces: Iterable[np.ndarray], weighting: Weighting) -> float:
    """Σwx of all rows' values, which come in ``pieces``; exact, however the pieces were cut."""

    def products() -> Iterator[np.ndarray]:
        start = 0
        for piece in pieces:
            weights = weighting.training(start, start + len(piece))
            yield piece if weights is None else piece * weights
            start += len(piece)

    return exact_sum(products())


def is_iterator(X: Any) -> bool:
    """Whether ``X`` gives arrays one after the other, once."""
    return hasattr(X, "__next__") and not hasattr(X, "shape")


def float_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type that scikit-learn keeps parameters in for rows of ``dtype``: float32 for float32, else float64."""
    return np.dtype(np.float32 if dtype == np.float32 else np.float64)


def result_dtype(rows: np.dtype[np.generic], parameters: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type of densities of ``rows`` under ``parameters``, as NumPy promotes the two."""
    return np.result_type(np.float32 if rows == BFLOAT16 else rows, parameters)


def joined(pieces: Iterable[np.ndarray], out: np.ndarray) -> np.ndarray:
    """``pieces``, in order, in ``out``, which they fill."""
    start = 0
    for piece in pieces:
        out[start : start + len(piece)] = piece
        start += len(piece)
    return out


def is_streamed(X: Any) -> bool:
    """Whether ``X`` is read piece by piece, rather than checked as a whole."""
    if isinstance(X, (Source, str, bytes, os.PathLike, torch.Tensor, np.memmap)):
        return True
    if is_dask(X) or is_zarr_array(X) or is_zarr_group(X):
        return True
    if np.ma.isMaskedArray(X):  # scikit-learn would use what is masked
        return True
    return isinstance(X, (list, tuple)) and any(
        isinstance(item, (Source, str, os.PathLike)) or len(getattr(item, "shape", ())) == 2 for item in X
    )
