"""Rows that stay on a device as a kernel works with them: half or a quarter as wide as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from streamgmm.kernels import Kernel, Run

UNIT = 1024
"""Rows of one flag; divides every granule."""


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows (n, D) from a granule's first on, in fp16 as a kernel's first step leaves them, without padding.

    Attributes
    ----------
    x : (n, D) fp16 tensor
        x' of `frame`.
    norms : (n,) fp32 tensor
        ‖x'‖²; of length zero where the kernel needs none.
    flags : (n / UNIT,) int32 tensor
        Not 0 where some row of a unit does not fit fp16.
    stored : callable
        Rows from ``first`` to before ``last`` of those that were kept together, (last − first, D) as stored.
    first : int
        The place of the first row among these.
    """

    x: Tensor
    norms: Tensor
    flags: Tensor
    stored: Callable[[int, int], Tensor]
    first: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getitem__(self, own: slice) -> KeptRows:
        """Some of the rows, from a granule's first on."""
        start, stop, _ = own.indices(len(self))
        units = slice(start // UNIT, -(-stop // UNIT))
        return KeptRows(self.x[own], self.norms[own], self.flags[units], self.stored, self.first + start)

    def as_stored(self) -> Tensor:
        """The rows as they are stored. Raises as the source they are read from."""
        return self.stored(self.first, self.first + len(self))

    def padded(self, n_padded: int, stride: int, granule: int, flags: Tensor) -> tuple[Tensor, Tensor]:
        """x (n_padded, stride) and norms, zero in the padding; ``flags`` (granules,) get those of the rows."""
        (n, d), units = self.x.shape, granule // UNIT
        each = torch.zeros(len(flags) * units, dtype=flags.dtype, device=flags.device)
        each[: len(self.flags)] = self.flags
        torch.amax(each.view(-1, units), dim=1, out=flags)
        x, norms = self.x, self.norms
        if x.shape != (n_padded, stride):
            x = torch.zeros((n_padded, stride), dtype=x.dtype, device=x.device)
            x[:n, :d] = self.x
        if len(norms) != n_padded:
            norms = torch.zeros(n_padded if len(norms) else 1, dtype=norms.dtype, device=norms.device)
            norms[: len(self.norms)] = self.norms
        return x, norms


class KeptForm(Protocol):
    """A form in which rows are kept: an `io.residency.Narrowing` that tells what it left."""

    @property
    def key(self) -> Hashable: ...

    def size(self, rows: int) -> int: ...

    def narrow(self, rows: Tensor, place: Tensor) -> None: ...

    def rows(self, place: Tensor, n: int, stored: Callable[[int, int], Tensor]) -> KeptRows:
        """The ``n`` rows that `narrow` left in ``place``; ``stored`` as in `KeptRows`."""
        ...


@runtime_checkable
class RunKernel(Kernel, Protocol):
    """A kernel that takes the rows of several sums in one call, in a form in which they are kept, too."""

    def kept_form(self, parameters: Any) -> KeptForm | None:
        """The form; None where it is that of the stored rows."""
        ...

    def accumulate_runs(
        self, rows: Tensor | KeptRows, parameters: Any, runs: Sequence[Run], weights: Tensor | None = None
    ) -> None:
        """`Kernel.accumulate` of each run, with the same bits for rows in either form.

        Together the runs are all rows, in order, and every one begins at a granule.
        """
        ...
