"""Reads past the page cache: for data so much larger than memory that caching it only evicts what is of use."""

from __future__ import annotations

import mmap
import os
from threading import local

import numpy as np

ALIGNMENT = 4096
"""What offsets, lengths and addresses are multiples of; no common device asks for more."""

SCRATCH_BYTES = 2 << 20
"""Aligned memory of each thread that reads so."""


def fill_direct(descriptor: int, offset: int, out: np.ndarray) -> int:
    """Fill ``out`` (uint8) from ``offset`` of a file open with ``O_DIRECT``; gives the bytes read before its end.

    The device is asked for aligned supersets: straight into ``out`` where memory and file are aligned alike, else
    through this thread's scratch. Short reads are continued from the aligned byte before their end.

    Raises
    ------
    OSError
        EINVAL where the file system refuses such reads; else as `os.preadv`.
    """
    done, address, view = 0, out.ctypes.data, out.data
    while done < len(out):
        position, left = offset + done, len(out) - done
        if left >= ALIGNMENT and not position % ALIGNMENT and not (address + done) % ALIGNMENT:
            count = os.preadv(descriptor, [view[done : done + left - left % ALIGNMENT]], position)
            if count == 0:
                return done
            done += count
            continue
        skipped = position % ALIGNMENT
        wanted = min(SCRATCH_BYTES, -(-(skipped + left) // ALIGNMENT) * ALIGNMENT)
        scratch = _scratch()
        count = os.preadv(descriptor, [scratch[:wanted]], position - skipped)
        taken = min(count - skipped, left)
        if taken <= 0:
            return done
        view[done : done + taken] = scratch[skipped : skipped + taken]
        done += taken
    return done


def _scratch() -> memoryview:
    """Page-aligned memory of this thread, the same at every call."""
    if not hasattr(_local, "scratch"):
        _local.scratch = memoryview(mmap.mmap(-1, SCRATCH_BYTES))
    scratch: memoryview = _local.scratch
    return scratch


_local = local()
