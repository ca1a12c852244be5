"""What the driver of a GPU is asked directly, since asking through torch takes longer than the call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch


def begin_copy(target: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Begin to copy ``size`` bytes from pinned memory to a device, by their addresses, in a ``stream``'s order.

    As `Tensor.copy_`, but that one lets go of the interpreter and gets it back after all other threads. Nobody learns
    of the copy: both memories are to be held until the stream has passed it. To be called where ``stream`` is current.

    Raises
    ------
    RuntimeError
        The driver refuses.
    """
    status = _copy()(target, source, size, stream.cuda_stream)
    if status:
        raise RuntimeError(f"copying {size} bytes to the device failed: the CUDA driver gives error {status}")


def can_copy() -> bool:
    """Whether this is a build of torch for CUDA."""
    return torch.version.cuda is not None


@cache
def _copy() -> Callable[[int, int, int, int], int]:
    function = ctypes.PyDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2  # a CDLL would let go of the interpreter
    function.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
