"""bfloat16 rows, which NumPy has no type for: on the host they travel as two opaque bytes a value."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.generic]
Array = TypeVar("Array", bound=Any)

BFLOAT16: np.dtype[np.generic] = np.dtype("V2")
"""What ``.npy`` and Zarr files call the bfloat16 that ml_dtypes writes."""


def type_name(dtype: np.dtype[np.generic]) -> str:
    """The name of a stored type, for messages and fingerprints."""
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def opaque(array: Array) -> Array:
    """``array``, of NumPy or Dask, with the bfloat16 that ml_dtypes adds to NumPy as `BFLOAT16`."""
    viewed: Array = array.view(BFLOAT16) if array.dtype.name == "bfloat16" else array
    return viewed


def value_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type of `values`."""
    return np.dtype(np.float32) if dtype == BFLOAT16 else dtype


def values(rows: Rows) -> Rows:
    """``rows`` as numbers: bfloat16 as float32, which holds every one of its values; other types as they are."""
    if rows.dtype != BFLOAT16:
        return rows
    # A bfloat16 is the upper half of the float32 of the same value.
    return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def as_tensor(rows: Rows) -> Tensor:
    """``rows`` as a tensor of the type they are stored in, in the same memory."""
    if rows.dtype != BFLOAT16:
        return torch.from_numpy(rows)
    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)


def as_rows(tensor: Tensor) -> Rows:
    """The inverse of `as_tensor`; the tensor lies on the host."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(BFLOAT16)
