"""`partial_fit`: stepwise EM with an update a call, for data that arrives piece by piece.

The update is `steps.stepwise`'s; here a batch is as large as the caller makes it, and nobody knows how many will come,
so the step size falls with the number of updates alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from streamgmm.device import compute_workers
from streamgmm.errors import NumericalError
from streamgmm.estep import bind, e_step
from streamgmm.inference import frame_of_mixture
from streamgmm.io.bfloat16 import as_tensor
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS
from streamgmm.mixture import Mixture
from streamgmm.parallel import one_thread
from streamgmm.precision import CHECK_ROWS, choose_precision, first_precision
from streamgmm.seeding import check_finite, uniform_rows
from streamgmm.statistics import BLOCK_ROWS, Statistics
from streamgmm.weighting import Weighting

_EXPONENT = 0.6


def step_size(n_updates: int) -> float:
    """γ_t = (t + 2)^−0.6 after t updates: Σγ diverges and Σγ² does not, as convergence needs.

    Cappé & Moulines (2009), "On-line expectation-maximization algorithm for latent data models", theorem 1.
    """
    return float((n_updates + 2) ** -_EXPONENT)


def batch_statistics(
    mixture: Mixture, source: Source, weighting: Weighting, precision: str, device: torch.device
) -> Statistics:
    """Sums over all rows at the parameters of ``mixture``, in the data's units, on the host.

    Raises
    ------
    DataError
        A row holds NaN or infinity, or a weight is negative.
    NumericalError
        A likelihood is not finite in ``precision``, or, for ``auto``, in any.
    """
    workers = compute_workers(device)
    frame = frame_of_mixture(mixture, source.dtype)
    chosen = precision
    if precision == "auto":
        n = source.shape[0]
        rows, _ = source.gather(uniform_rows(n, min(n, CHECK_ROWS), np.random.default_rng(0)))
        chosen = choose_precision(mixture, frame, first_precision(precision), as_tensor(rows).to(device), workers)
    while True:
        bound = bind(mixture, frame, chosen, device, workers)
        statistics = bound.empty_statistics()
        with one_thread():
            for start in range(0, source.shape[0], BLOCK_ROWS):
                stop = min(start + BLOCK_ROWS, source.shape[0])
                weights = weighting.training(start, stop)
                own = None if weights is None else torch.from_numpy(weights).to(device)
                e_step(as_tensor(source.read(start, stop)).to(device), bound, statistics, own)
        if math.isfinite(float(statistics.log_likelihood)):
            return frame.restore(bound.finish(statistics)).to("cpu")
        _refuse_not_finite(source)
        if chosen == PRECISIONS[-1] or precision != "auto":
            raise NumericalError(
                f"{source.name}: a likelihood is not finite in precision {chosen!r}; use precision='auto', or scale "
                "the data"
            )
        chosen = PRECISIONS[-1]


def _refuse_not_finite(source: Source) -> None:
    """Raise DataError where a row holds NaN or infinity."""
    for start in range(0, source.shape[0], BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, source.shape[0])
        check_finite(source, source.read(start, stop), np.arange(start, stop))
