"""Files of clustered rows, made on a device a piece at a time: any number of rows, the same for the same sizes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 20
SUFFIXES = {torch.uint8: ".u8bin", torch.int8: ".i8bin", torch.float16: ".f16bin", torch.float32: ".fbin"}
_CLUSTERS, _SPREAD, _NOISE, _MIDDLE = 512, 40.0, 12.0, 128
_SCRAMBLE = 2654435761
"""Odd, so that multiplication by it modulo 2³² maps no two numbers to one."""
_NUMBERED = 16


def piece(start: int, n: int, n_rows: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows [start, start + n) of ``n_rows``, (n, features), in clusters whose shares drift along the rows.

    Of uint8, two bits of the scrambled number of the row lie in the two lowest of each of 16 features: no two rows are
    equal.
    """
    generator = torch.Generator(device).manual_seed(start)
    centres = torch.randn((_CLUSTERS, features), generator=torch.Generator().manual_seed(1)) * _SPREAD
    number = torch.arange(start, start + n, device=device)
    # The share of low numbers grows along the file.
    tilt = 0.5 + number.double() / n_rows
    cluster = (torch.rand(n, generator=generator, device=device).double() ** tilt * _CLUSTERS).long()
    noise = torch.randn((n, features), generator=generator, device=device) * _NOISE
    if dtype.is_floating_point:
        return (centres.to(device)[cluster] + noise).to(dtype)
    if dtype == torch.int8:
        return (centres.to(device)[cluster] + noise).round().clamp(-128, 127).to(dtype)
    rows = ((centres + _MIDDLE).to(device)[cluster] + noise).round().clamp(0, 255).to(dtype)
    if features >= _NUMBERED:
        scrambled = number * _SCRAMBLE % (1 << 32)
        bits = (scrambled[:, None] >> torch.arange(0, 32, 2, device=device)) & 3
        rows[:, :_NUMBERED] = (rows[:, :_NUMBERED] & 252) | bits.to(dtype)
    return rows


def write(
    path: Path, n_rows: int, features: int, dtype: torch.dtype, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """A file of the rows, ``path`` with the ending of `SUFFIXES`, not in the page cache; gives mean and deviation."""
    kind = torch.int64 if not dtype.is_floating_point else torch.float64
    total, squares = (torch.zeros(features, dtype=kind, device=device) for _ in range(2))
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        file.write(np.array([n_rows, features], "<u4").tobytes())
        written = None
        for start in range(0, n_rows, PIECE):
            rows = piece(start, min(PIECE, n_rows - start), n_rows, features, dtype, device)
            total += rows.sum(0, dtype=kind)
            squares += rows.to(kind).square().sum(0)
            if written is not None:
                written.result()
            written = writer.submit(file.write, rows.cpu().numpy())
        if written is not None:
            written.result()
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mean = total.cpu().numpy() / n_rows
    return mean, np.sqrt(squares.cpu().numpy() / n_rows - mean**2)
