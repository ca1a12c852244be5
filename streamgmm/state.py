"""What a run needs to go on, as one record; and that record as named tensors, for a file or for another process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.mixture import Mixture
from streamgmm.passes import Course, Step, rows_before, steps_of
from streamgmm.statistics import Statistics, SummationTree
from streamgmm.steps.candidate import Candidate

Arrays = dict[str, np.ndarray | Tensor]
"""Parameters as arrays and sums as tensors, each where it lies."""


@dataclass(frozen=True, eq=False)
class OpenSegment:
    """A segment of the step under way, a leaf of its tree, that is summed up to a row.

    Attributes
    ----------
    segment : int
    cursor : int
        Rows from the segment's first to before this one are in ``sums``.
    sums : tuple of Statistics
        One for each candidate that is not converged; further rows are added in place.
    checksum : int or None
        Of those rows that lie in the last row's region, `integrity.fold`; None where they were not checked.
    skipped : int
        How many of them were left out because they are not finite.
    comparing : bool
        Whether that region is being compared with an earlier pass. Until it ends, its rows may turn out to have
        changed, so these sums are not to be saved.
    """

    segment: int
    cursor: int
    sums: tuple[Statistics, ...]
    checksum: int | None = 0
    skipped: int = 0
    comparing: bool = False


@dataclass(frozen=True)
class SoFar:
    """The steps before the current one in its pass: log-likelihood and weight of their rows, and rows skipped."""

    log_likelihood: float = 0.0
    n_rows: float = 0.0
    skipped: int = 0


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything a run needs to go on; a checkpoint is this record.

    Attributes
    ----------
    candidates : tuple of Candidate
        Models trained on the same passes; one is the usual case.
    frame : Frame
    trees : tuple of SummationTree
        The finished segments of the current step, for each candidate that is not converged; empty between steps.
    opened : tuple of OpenSegment
        The segments under way: one a process.
    rows_read : int
        Since the beginning of the run, sampling and seeding included.
    checksums : tuple of (region, checksum)
        Of the data in the first pass that finished the region, of `passes.regions`; later data must match.
    skipped : int
        Rows of the finished segments of the current step, or of the last pass, that were left out because they are not
        finite.
    course : Course
        How the run goes over the data.
    number, step : int
        The current pass, from 0, and the step in it.
    before : Mixture or None
        The one candidate's at the beginning of the stepwise pass under way, should it have to be undone.
    so_far : SoFar
        Of a stepwise pass.
    """

    candidates: tuple[Candidate, ...]
    frame: Frame
    trees: tuple[SummationTree, ...] = ()
    opened: tuple[OpenSegment, ...] = ()
    rows_read: int = 0
    checksums: tuple[tuple[int, int], ...] = ()
    skipped: int = 0
    course: Course = field(default_factory=Course)
    number: int = 0
    step: int = 0
    before: Mixture | None = None
    so_far: SoFar = field(default_factory=SoFar)

    @property
    def active(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if not candidate.converged)

    @property
    def n_iter(self) -> int:
        return max(candidate.n_iter for candidate in self.candidates)

    @property
    def best(self) -> Candidate:
        """As `best_of`."""
        return best_of(self.candidates)

    @property
    def finished(self) -> frozenset[int]:
        """Segments of the current step whose sums are complete."""
        return self.trees[0].finished if self.trees else frozenset()

    def spans(self, n_samples: int) -> Step:
        """The segments of the current step; none where the course has no such step."""
        return next(iter(steps_of(self.course, n_samples, self.number)[self.step :]), ())

    def rows_summed(self, n_samples: int) -> int:
        """Rows of the current pass that need not be read again; 0 between passes."""
        first = {span.segment: span.start for span in self.spans(n_samples)}
        rows = rows_before(self.course, n_samples, self.number, self.step)
        rows += sum(span.rows for span in self.spans(n_samples) if span.segment in self.finished)
        return rows + sum(opened.cursor - first.get(opened.segment, opened.cursor) for opened in self.opened)


def best_of(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate with the greatest lower bound; the first, before any has one."""
    return max(candidates, key=lambda candidate: candidate.lower_bounds[-1:] or (-math.inf,))


def settled(state: TrainingState, n_samples: int) -> TrainingState:
    """The state without segments whose rows may turn out to have changed; no row of theirs is counted twice."""
    first = {span.segment: span.start for span in state.spans(n_samples)}
    again = sum(opened.cursor - first[opened.segment] for opened in state.opened if opened.comparing)
    kept = tuple(opened for opened in state.opened if not opened.comparing)
    return replace(state, opened=kept, rows_read=state.rows_read - again)


def snapshot(state: TrainingState) -> TrainingState:
    """A copy on the host that further additions do not touch."""

    def copied(opened: OpenSegment) -> OpenSegment:
        return replace(opened, sums=tuple(sums.clone().to("cpu") for sums in opened.sums))

    return replace(state, opened=tuple(copied(opened) for opened in state.opened))


def pack(state: TrainingState) -> tuple[dict[str, object], Arrays]:
    """JSON values and named fp64 arrays that hold all of ``state``; nothing is copied."""
    arrays: Arrays = {**state.frame.tensors("frame.")}
    for i, candidate in enumerate(state.candidates):
        arrays |= candidate.mixture.tensors(f"candidate.{i}.")
        for j, mixture in enumerate(_behind(candidate)):
            arrays |= mixture.tensors(f"behind.{i}.{j}.")
    candidates = [
        {
            "precision": c.precision,
            "lower_bounds": list(c.lower_bounds),
            "converged": c.converged,
            "empty": list(c.empty),
            "degenerate": list(c.degenerate),
            "n_rows": c.n_rows,
            **({"behind": len(_behind(c)), "fallback": c.fallback is not None} if _behind(c) else {}),
        }
        for c in state.candidates
    ]
    if state.before is not None:
        arrays |= state.before.tensors("before.")
    course = {
        "course": asdict(state.course),
        "number": state.number,
        "step": state.step,
        "so_far": asdict(state.so_far),
        "undoable": state.before is not None,
    }
    facts, sums = pack_sums(state)
    return {**facts, "candidates": candidates, **course}, arrays | sums


def pack_sums(state: TrainingState) -> tuple[dict[str, object], Arrays]:
    """The same for what a step adds to a state: all but candidates, frame and course."""
    arrays: Arrays = {}
    for i, tree in enumerate(state.trees):
        for (level, index), sums in tree.nodes:
            arrays |= {} if sums is None else sums.tensors(f"tree.{i}.{level}.{index}.")
    for opened in state.opened:
        for i, sums in enumerate(opened.sums):
            arrays |= sums.tensors(f"open.{opened.segment}.{i}.")
    return {
        "covariance_type": state.candidates[0].mixture.covariance_type,
        "rows_read": state.rows_read,
        "checksums": [list(pair) for pair in state.checksums],
        "skipped": state.skipped,
        "trees": [[[*node, sums is not None] for node, sums in tree.nodes] for tree in state.trees],
        "opened": [
            {
                "segment": opened.segment,
                "cursor": opened.cursor,
                "checksum": opened.checksum,
                "skipped": opened.skipped,
                "comparing": opened.comparing,
                "sums": len(opened.sums),
            }
            for opened in state.opened
        ],
    }, arrays


def unpack(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TrainingState:
    """The inverse of `pack`; sums lie where ``tensors`` do, in their memory.

    Raises
    ------
    KeyError, TypeError, ValueError, AttributeError, OverflowError
        Something is missing, or of the wrong kind.
    """
    kind = str(facts["covariance_type"])
    parameters = ("frame.", "candidate.", "behind.", "before.")
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items() if name.startswith(parameters)}

    def candidate(i: int, known: dict[str, Any]) -> Candidate:
        # Most have no other mixtures behind them, and none of the first release does.
        behind = tuple(Mixture.from_tensors(arrays, kind, f"behind.{i}.{j}.") for j in range(known.get("behind", 0)))
        fallback = next(reversed(behind), None) if known.get("fallback", False) else None
        return Candidate(
            Mixture.from_tensors(arrays, kind, f"candidate.{i}."),
            known["precision"],
            tuple(known["lower_bounds"]),
            known["converged"],
            tuple(known["empty"]),
            tuple(known["degenerate"]),
            float(known["n_rows"]),
            behind if fallback is None else behind[:-1],
            fallback,
        )

    candidates = tuple(candidate(i, known) for i, known in enumerate(_list(facts["candidates"])))
    state = TrainingState(candidates, Frame.from_tensors(arrays, "frame."))
    if "course" in facts:  # checkpoints of the first release have none: theirs is full-batch EM
        state = replace(
            state,
            course=Course(**facts["course"]),
            number=int(facts["number"]),
            step=int(facts["step"]),
            before=Mixture.from_tensors(arrays, kind, "before.") if facts["undoable"] else None,
            so_far=SoFar(**facts["so_far"]),
        )
    return unpack_sums(state, facts, tensors)


def unpack_sums(state: TrainingState, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TrainingState:
    """``state`` with what `pack_sums` told of another one in place of its own. Raises as `unpack`."""
    kind = str(facts["covariance_type"])

    def sums(prefix: str) -> Statistics:
        return Statistics.from_tensors(tensors, kind, prefix)

    trees = tuple(
        SummationTree(
            tuple(
                ((level, index), sums(f"tree.{i}.{level}.{index}.") if filled else None)
                for level, index, filled in _list(nodes)
            )
        )
        for i, nodes in enumerate(_list(facts["trees"]))
    )
    opened = tuple(
        OpenSegment(
            int(known["segment"]),
            int(known["cursor"]),
            tuple(sums(f"open.{known['segment']}.{i}.") for i in range(int(known["sums"]))),
            None if known["checksum"] is None else int(known["checksum"]),
            int(known["skipped"]),
            bool(known["comparing"]),
        )
        for known in _list(facts["opened"])
    )
    return replace(
        state,
        trees=trees,
        opened=opened,
        rows_read=int(facts["rows_read"]),
        checksums=tuple((int(segment), int(checksum)) for segment, checksum in _list(facts["checksums"])),
        skipped=int(facts["skipped"]),
    )


def _behind(candidate: Candidate) -> tuple[Mixture, ...]:
    """The trail, and then the fallback."""
    return (*candidate.trail, *([] if candidate.fallback is None else [candidate.fallback]))


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return value
