"""What the device reaches, and the least time that a pass can take there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .clocks import milliseconds
from .workloads import Workload

PRODUCTS = {"medium": (1, 1), "high": (5, 4)}
"""Products of fp16 numbers that one of a density, and one of a sum, consists of."""


@triton.jit
def _exponentials(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: dense fp16 products (flop/s), copies (bytes/s, read and written), exp2 (1/s)."""

    products: float
    copies: float
    exponentials: float

    @classmethod
    def measured(cls, device: torch.device) -> Ceilings:
        side, width, rounds, block = 8192, 1 << 28, 512, 1024
        a, b = (torch.randn((side, side), device=device, dtype=torch.float16) for _ in range(2))
        out = torch.empty_like(a)
        source = torch.ones(width, device=device)
        target = torch.empty_like(source)
        programs = 132 * 64
        return cls(
            2e3 * side**3 / milliseconds(lambda: torch.mm(a, b, out=out), device, 20),
            2e3 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 20),
            1e3 * programs * block * rounds
            / milliseconds(lambda: _exponentials[(programs,)](target, ROUNDS=rounds, BLOCK=block), device, 20),
        )  # fmt: skip

    def floor_ms(self, case: Workload, precision: str, stored: torch.dtype, live: float) -> float:
        """The least time of a pass that evaluates all N·K densities, then again those of ``live`` pairs.

        A product of N × D by D × K costs 2NKD. Logits take one; two for ``diag``, x and x²; D for ``full``, whose
        components each multiply by a D × D factor. Live pairs take their logits again, and sums that cost as much.
        ``high`` makes each of them several products of planes, `PRODUCTS`. Σxxᵀ of ``tied``, which no mixture changes,
        is left out. Either launch reads the rows, as they are stored; the way through a working type is the kernel's
        own affair.
        """
        n, d = case.rows.shape
        k, kind = case.mixture.n_components, case.mixture.covariance_type
        product = 2.0 * n * k * d * {"spherical": 1, "tied": 1, "diag": 2, "full": d}[kind]
        logits, sums = PRODUCTS[precision]
        seconds = (
            product * (logits * (1 + live) + sums * live) / self.products,
            n * k * (1 + live) / self.exponentials,
            2 * n * d * stored.itemsize / self.copies,
        )
        return 1e3 * max(seconds)
