"""Whether an object is of a library that nobody may have imported."""

from __future__ import annotations

import sys
from typing import Any


def is_dask(data: Any) -> bool:
    """Whether ``data`` is a Dask array."""
    return _is_instance(data, "dask.array", "Array")


def is_zarr_array(data: Any) -> bool:
    """Whether ``data`` is a Zarr array."""
    return _is_instance(data, "zarr", "Array")


def is_zarr_group(data: Any) -> bool:
    """Whether ``data`` is a group of Zarr arrays."""
    return _is_instance(data, "zarr", "Group")


def _is_instance(data: Any, module: str, name: str) -> bool:
    # Whoever holds an object of a library has imported it; nobody else pays for that.
    found = sys.modules.get(module)
    return found is not None and isinstance(data, getattr(found, name))
