"""What is trained, how, and who sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from streamgmm.distributed import ALONE, World
from streamgmm.estep import BoundMixture, bind
from streamgmm.io.sources.base import Source
from streamgmm.mixture import Mixture
from streamgmm.state import TrainingState
from streamgmm.steps.candidate import Candidate, Step
from streamgmm.steps.stepwise import StepwiseStep
from streamgmm.steps.watch import Look, Watch
from streamgmm.weighting import Weighting


@dataclass(frozen=True, eq=False)
class TrainingSettings:
    """When to stop, and how to compute.

    Attributes
    ----------
    weighting : Weighting
        What each row counts.
    max_iter : int
        Full-batch updates, and stepwise passes.
    max_passes : float
        Rows read over rows there are, everything counted.
    precision : str
        ``auto`` or one of ``kernels.PRECISIONS``.
    workers : int
        Compute threads on a CPU; they change no bit.
    hard : bool
        Each row belongs to its most likely component alone, as in k-means.
    """

    weighting: Weighting
    max_iter: int
    max_passes: float
    precision: str
    workers: int
    hard: bool = False


class Observer(Protocol):
    """What sees a process train, and may end it."""

    def chunk(self, state: TrainingState) -> None:
        """A chunk was added."""
        ...

    def wants(self) -> bool:
        """Whether the sums so far are to be saved, or the run is to stop."""
        ...

    def stop_requested(self) -> int | None:
        """The signal that asked for it, or None."""
        ...

    def warn(self, text: str) -> None:
        """Something that does not stop the run."""
        ...

    def updated(self, state: TrainingState, look: Look | None) -> None:
        """A pass ended and every active candidate was updated; the leader's alone, as what follows.

        ``look`` is what became of the rows that are watched, if any are.
        """
        ...

    def stepped(self, state: TrainingState) -> None:
        """An update was made within a pass."""
        ...

    def checkpoint(self, state: TrainingState) -> None:
        """Save ``state``, the sums of all processes."""
        ...

    def rescue(self, state: TrainingState) -> None:
        """Save ``state``, what is left of them, where it is more than was saved before."""
        ...

    def stop(self, state: TrainingState, number: int) -> NoReturn:
        """Save ``state`` and raise Interrupted."""
        ...


@dataclass(frozen=True, eq=False)
class Lead:
    """What only the leader needs.

    Attributes
    ----------
    step : Step
        What one full-batch update is.
    check_rows : (n, D) tensor
        Rows, on the device, on which precisions are checked.
    stepwise : StepwiseStep or None
        What one update within a pass is; None where there are none.
    watch : Watch or None
        Rows on which every pass is judged.
    bound : dict
        What was bound to check a precision, by mixture, until the pass takes it.
    """

    step: Step
    check_rows: Tensor
    stepwise: StepwiseStep | None = None
    watch: Watch | None = None
    bound: dict[Mixture, BoundMixture] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Training:
    """What does not change while a state is trained; ``lead`` is the leader's."""

    source: Source
    settings: TrainingSettings
    device: torch.device
    observer: Observer
    world: World = ALONE
    lead: Lead | None = None


def bound_for(candidate: Candidate, state: TrainingState, training: Training) -> BoundMixture:
    """The candidate as the E-step takes it; bound already where its precision was checked."""
    known = training.lead.bound.pop(candidate.mixture, None) if training.lead else None
    if known is not None and known.precision == candidate.precision:
        return known
    settings = training.settings
    return bind(candidate.mixture, state.frame, candidate.precision, training.device, settings.workers, settings.hard)
