"""How an index stores vectors."""

from __future__ import annotations

from dataclasses import dataclass

from streamgmm.errors import RequestError

KINDS = ("flat", "pq", "sq")
"""IndexIVFFlat, IndexIVFPQ, IndexIVFScalarQuantizer."""

SCALAR_BITS = (4, 6, 8, 16)
"""Bits a feature of ``sq``; 16 is half precision."""


@dataclass(frozen=True)
class Coding:
    """How vectors are stored.

    Attributes
    ----------
    kind : {'flat', 'pq', 'sq'}
        float32 as they are; product-quantised residuals; scalar-quantised residuals.
    subspaces : int, optional
        Of ``pq``; it divides D. None: the largest divisor of D up to D / 4.
    bits : int
        A subspace of ``pq`` (1 to 12), or a feature of ``sq`` (4, 6, 8, 16).
    """

    kind: str = "flat"
    subspaces: int | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.kind != "pq" and self.subspaces is not None:
            raise RequestError(f"subspaces belong to kind pq, and the kind is {self.kind!r}; leave them out")
        if self.kind == "pq" and not 1 <= self.bits <= 12:
            raise RequestError(f"bits must be between 1 and 12 for pq; got {self.bits}")
        if self.kind == "sq" and self.bits not in SCALAR_BITS:
            raise RequestError(f"bits must be one of {', '.join(map(str, SCALAR_BITS))} for sq; got {self.bits}")

    def subspaces_of(self, n_features: int) -> int:
        """Subspaces of ``pq`` for D features."""
        if self.subspaces is None:
            return max(m for m in range(1, max(2, n_features // 4 + 1)) if n_features % m == 0)
        if not 1 <= self.subspaces <= n_features or n_features % self.subspaces:
            raise RequestError(f"subspaces must divide the {n_features} features; got {self.subspaces}")
        return self.subspaces
