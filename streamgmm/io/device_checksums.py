# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""`integrity.unit_checksums` of rows that lie on a GPU, where they take next to no time.

A CRC without its first and last step is linear over GF(2), and a CRC-32C is that of as many zero bytes XOR the linear
part: Σ_i A^(W−i) w_i for the W little-endian words w_i of a unit, A the step over 32 zero bits. Each lane sums every
`LANES`-th word by Horner's rule, with A^LANES looked up byte by byte, and brings its sum to the unit's end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.arriving import Arriving
from streamgmm.device import on
from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.integrity import UNIT_ROWS, unit_checksums

LANES = 1024

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, reflected."""


def device_unit_checksums(rows: Tensor) -> Callable[[], bytes]:
    """What gives `unit_checksums` of ``rows`` (n, D), contiguous: they are on their way, and waited for when called."""
    whole = len(rows) // UNIT_ROWS
    checksums = torch.empty(whole, dtype=torch.int32, device=rows.device)
    if whole:
        words = rows[: whole * UNIT_ROWS].view(-1).view(torch.int32)
        n_words = len(words) // whole
        table, columns = _operators(rows.device)
        with on(rows.device):
            crc_units[(whole,)](
                words, table, columns, checksums, n_words, -(-n_words // LANES), _checksum_of_zeros(n_words),
                LANES=LANES, num_warps=8,
            )  # fmt: skip
    arriving = Arriving.sent(checksums, rows[whole * UNIT_ROWS :].clone())

    def arrived() -> bytes:
        units, tail = arriving.wait()
        return units.numpy().astype("<i4").tobytes() + unit_checksums(as_rows(tail))

    return arrived


@triton.jit(do_not_specialize=["n_words", "n_steps", "zeros"])
def crc_units(words, table, columns, checksums, n_words, n_steps, zeros, LANES: tl.constexpr):
    """``checksums`` (units,) int32 of ``n_words`` int32 each, in ``n_steps``; ``zeros`` is that of a unit of zeros.

    ``table`` (4, 256) is A^LANES of each byte, and ``columns`` (32, LANES) A^(LANES−lane) of each bit.
    """
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    # Zeros in front of a message do not change the linear part.
    place = lane - (n_steps * LANES - n_words)
    total = tl.zeros([LANES], tl.int32)
    for _ in range(n_steps):
        word = tl.load(words + unit * n_words + place, mask=place >= 0, other=0)
        after = tl.load(table + (total & 255))
        after ^= tl.load(table + 256 + ((total >> 8) & 255))
        after ^= tl.load(table + 512 + ((total >> 16) & 255))
        after ^= tl.load(table + 768 + ((total >> 24) & 255))
        total = after ^ word
        place += LANES
    moved = tl.zeros([LANES], tl.int32)
    for bit in tl.static_range(32):
        moved ^= -((total >> bit) & 1) & tl.load(columns + bit * LANES + lane)
    tl.store(checksums + unit, tl.xor_sum(moved, axis=0) ^ zeros)


@cache
def _checksum_of_zeros(n_words: int) -> int:
    """As int32."""
    return int(np.array(crc32c(bytes(4 * n_words)), np.uint32).view(np.int32))


@cache
def _operators(device: torch.device) -> tuple[Tensor, Tensor]:
    """``table`` and ``columns`` of `crc_units`."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    step = _four_zero_bytes(bits)
    columns = np.empty((32, LANES), np.uint32)
    images = bits
    for lane in reversed(range(LANES)):
        images = _applied(step, images)
        columns[:, lane] = images
    table = _applied(columns[:, 0], np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None])
    return torch.from_numpy(table.view(np.int32)).to(device), torch.from_numpy(columns.view(np.int32)).to(device)


def _four_zero_bytes(states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    for _ in range(32):
        states = (states >> np.uint32(1)) ^ (states & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return states


def _applied(operator: NDArray[np.uint32], states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A linear operator, given by its images (32,) of each bit, of many states."""
    shifts = np.arange(32, dtype=np.uint32).reshape(-1, *([1] * states.ndim))
    chosen = ((states >> shifts) & np.uint32(1)) * operator.reshape(shifts.shape)
    images: NDArray[np.uint32] = np.bitwise_xor.reduce(chosen, axis=0)
    return images
