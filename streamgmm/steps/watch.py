"""Rows on which every pass is judged, so that one which did harm can be undone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamgmm.estep import BoundMixture

HARMFUL_ERRORS = 3.0
"""A likelihood that falls by more standard errors than this did not fall by chance."""

WATCHED_ROWS = 4096
"""Rows of the sample on which the passes of a stepwise run are judged."""


@dataclass(frozen=True)
class Look:
    """What a pass did to the rows watched.

    Attributes
    ----------
    log_likelihood : float
        Mean after the pass, nats a row.
    change : float
        Since before the pass.
    error : float
        Standard error of that change: both mixtures see the same rows, so it is that of the differences.
    harmful : bool
        Whether the pass is to be undone.
    """

    log_likelihood: float
    change: float
    error: float
    harmful: bool


@dataclass(frozen=True, eq=False)
class Watch:
    """Rows (n, D) of the stored type on the device, n ≥ 2, and what each counts, (n,) fp64.

    They are kept out of the sample that the first mixture is made from, though the passes go over them too.
    """

    rows: Tensor
    weights: Tensor

    def look(self, before: BoundMixture, after: BoundMixture, undoable: bool) -> Look:
        """Compare two mixtures; only an ``undoable`` pass is found harmful."""
        old, new = (bound.log_likelihood(self.rows).double().cpu() for bound in (before, after))
        shares = (self.weights / self.weights.sum()).cpu()
        change = float(shares @ (new - old))
        error = float((shares**2 @ (new - old - change) ** 2).sqrt())
        # A likelihood that is not a number is as harmful as can be.
        harmful = undoable and not change >= -HARMFUL_ERRORS * error
        return Look(float(shares @ new), change, error, harmful)
