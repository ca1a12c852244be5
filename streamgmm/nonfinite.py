"""Sums that are not finite: which, why, and whether a wider precision is the remedy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.io.plan import Span
from streamgmm.precision import next_precision
from streamgmm.seeding import check_finite
from streamgmm.state import TrainingState
from streamgmm.statistics import SummationTree
from streamgmm.steps.candidate import Candidate
from streamgmm.task import Training, TrainingSettings

_RESCAN_ROWS = 16_384


def finite_sums(state: TrainingState) -> list[bool]:
    """Whether the likelihood of every row so far is a number, for each active candidate; a row that is not finite, or
    overflows, makes it none."""

    def finite(i: int, tree: SummationTree) -> bool:
        sums = [*(node for _, node in tree.nodes if node is not None), *(opened.sums[i] for opened in state.opened)]
        return math.isfinite(sum(float(each.log_likelihood) for each in sums))

    return [finite(i, tree) for i, tree in enumerate(state.trees)]


def explain(state: TrainingState, spans: list[Span], training: Training) -> None:
    """Return where a wider precision can be the remedy for sums that are not finite.

    Raises
    ------
    DataError
        The rows of ``spans`` hold NaN or infinity.
    NumericalError
        They are finite, and no wider precision is allowed.
    """
    source = training.source
    for span in spans if not training.settings.weighting.skip_nonfinite else ():
        for start in range(span.start, span.stop, _RESCAN_ROWS):
            stop = min(start + _RESCAN_ROWS, span.stop)
            check_finite(source, source.read(start, stop), np.arange(start, stop))
    widened(state, training.settings)


def widened(state: TrainingState, settings: TrainingSettings) -> TrainingState:
    """The next precision for each candidate whose sums are not finite. Raises NumericalError where there is none."""

    def wider(candidate: Candidate) -> Candidate:
        precision = next_precision(candidate.precision) if settings.precision == "auto" else None
        if precision is None:
            raise NumericalError(
                f"the likelihood of the data is not finite in precision {candidate.precision!r}; "
                "use precision='auto', or scale the data"
            )
        return replace(candidate, precision=precision)

    finite = iter(finite_sums(state))
    return replace(state, candidates=tuple(c if c.converged or next(finite) else wider(c) for c in state.candidates))
