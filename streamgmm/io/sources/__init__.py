"""Where rows come from: a file a format family, and one door to all of them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from streamgmm.errors import DataError
from streamgmm.io.objects.cache import Cache
from streamgmm.io.sources.array import ArraySource
from streamgmm.io.sources.base import Source
from streamgmm.io.sources.concat import ConcatSource
from streamgmm.io.sources.instances import is_dask, is_zarr_array, is_zarr_group
from streamgmm.io.sources.paths import open_path

__all__ = ["Cache", "Source", "open_source"]


def open_source(data: Any, cache: Cache | None = None) -> Source:
    """Rows of ``data``, whatever it is, shape (N, D).

    Parameters
    ----------
    data : Source, path, array, or list of paths or arrays
        A path is a file (``.npy``; ``.fbin``, ``.f16bin``, ``.u8bin``, ``.i8bin``; ``.fvecs``, ``.bvecs``; ``.h5``,
        ``.hdf5``; ``.arrow``, ``.feather``; ``.parquet``), something inside one (``file.h5::dataset``,
        ``file.parquet::column``), the folder of a Zarr array, or a folder of such files, all of one suffix; or the
        address of a Zarr array in an object store (``s3://``, ``gs://``, ``az://``, ``http(s)://``, ``memory://``). An
        array is a NumPy array or memory map, a torch tensor, a ``zarr.Array``, a Dask array, or anything that
        ``numpy.asarray`` makes an array of. A list of paths, sources or two-dimensional arrays is one data set, in that
        order; any other list (``[[1, 2], [3, 4]]``) is an array.

    cache : Cache, optional
        A local folder of bounded size that keeps what is read from object stores, from the first object on.

    Raises
    ------
    DataError
        The data is missing, unreadable, malformed or not two-dimensional; one line that names it and the remedy.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        return open_path(os.fsdecode(data), cache)
    if is_zarr_array(data):
        from streamgmm.io.sources.zarr_array import ZarrSource

        return ZarrSource(data)
    if is_zarr_group(data):
        from streamgmm.io.sources.zarr_array import group_refused

        raise group_refused(str(data.store_path), data)
    if is_dask(data):
        from streamgmm.io.sources.dask_array import DaskSource

        return DaskSource(data)
    if isinstance(data, (list, tuple)) and (not data or any(_is_part(item) for item in data)):
        return ConcatSource([open_source(item, cache) for item in data])
    return _open_array(data)


def _open_array(data: Any) -> Source:
    """Anything that is, or becomes, an array in memory."""
    if isinstance(data, torch.Tensor):
        try:
            return ArraySource(data, "torch tensor")
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"torch tensor: is no plain array ({reason}); give a dense tensor of numbers") from error
    name = str(data.filename) if isinstance(data, np.memmap) and data.filename else "array"
    if np.ma.is_masked(data):
        raise DataError("array: has masked values; fill them or leave their rows out")
    if isinstance(data, np.ndarray):
        return ArraySource(data, name)
    kind = type(data).__name__
    try:
        array = np.asarray(data)
    # ``__array__`` is the caller's code; NumPy itself raises ValueError for rows of unequal length.
    except Exception as error:
        raise DataError(f"{kind}: cannot be made an array ({' '.join(str(error).split())}); give an array") from error
    if array.dtype.hasobject:
        raise DataError(f"{kind}: holds Python objects, not numbers; give a dense two-dimensional array or a path")
    return ArraySource(array, name)


def _is_part(item: object) -> bool:
    """Whether ``item``, in a list, is a data set of its own rather than a row."""
    return isinstance(item, (Source, str, os.PathLike)) or len(getattr(item, "shape", ())) == 2
