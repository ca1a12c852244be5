"""Whether a state that was read from a file can be one that a run wrote.

A checksum shows that a file is as it was written, not who wrote it: shapes, types and ranges are checked before
anything is computed, or allocated, from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from streamgmm.kernels import PRECISIONS
from streamgmm.passes import REGION_UNIT, STEPS, regions, steps_of
from streamgmm.state import OpenSegment, TrainingState
from streamgmm.statistics import SEGMENTS, Statistics, SummationTree, scatter_shape
from streamgmm.steps.candidate import Candidate

_CHECKSUM_END = 1 << 32
_REGIONS_END = (STEPS + 1) * SEGMENTS
_PASSES_END = 100


def check_consistent(state: TrainingState) -> None:
    """Raise ValueError or TypeError, naming the part, where ``state`` contradicts itself."""
    d = len(state.frame.shift)
    _require(state.frame.shift.shape == state.frame.scale.shape == (d,), "frame")
    _require(state.rows_read >= 0, "rows_read")
    _require(bool(state.candidates), "candidates")
    for candidate in state.candidates:
        _require(candidate.mixture.n_features == d, "n_features")
        _check_candidate(candidate)
    sizes = [candidate.mixture.n_components for candidate in state.active]
    for tree in state.trees:
        _check_tree(tree, d)
    if state.trees:
        _require([_size_of(tree, k) for tree, k in zip(state.trees, sizes, strict=True)] == sizes, "trees")
        _require(all(tree.finished == state.finished for tree in state.trees), "trees")
    for opened in state.opened:
        _check_opened(opened, sizes, d)
    under_way = [opened.segment for opened in state.opened]
    _require(len(set(under_way)) == len(under_way) and state.finished.isdisjoint(under_way), "segments under way")
    _require(bool(state.trees) or not state.opened, "segments under way")
    _check_course(state)
    regions = [region for region, _ in state.checksums]
    _require(len(set(regions)) == len(regions) and all(0 <= r < _REGIONS_END for r in regions), "checksums")
    _require(all(0 <= checksum < _CHECKSUM_END for _, checksum in state.checksums), "checksums")


def check_fits(state: TrainingState, n_samples: int) -> None:
    """Raise ValueError where a consistent ``state`` cannot be one of a run over so many rows."""
    course = state.course
    # Before every region is listed.
    _require(course.region_rows == 0 or n_samples // course.region_rows <= STEPS * SEGMENTS, "course")
    parts = regions(course, n_samples)
    _require(all(region < len(parts) for region, _ in state.checksums), "checksums")
    _require(state.step < len(steps_of(course, n_samples, state.number)), "course")
    spans = {span.segment: span for span in state.spans(n_samples)}
    _require(len(spans) <= SEGMENTS, "course")
    _require(not state.trees or set(range(SEGMENTS)) - set(spans) <= state.finished, "trees")
    for opened in state.opened:
        span = spans.get(opened.segment)
        _require(span is not None and span.start < opened.cursor < span.stop, "segments under way")


def _check_course(state: TrainingState) -> None:
    course = state.course
    whole = (course.stepwise_passes, course.planned_passes, course.region_rows, course.seed, state.number, state.step)
    _require(all(type(number) is int and number >= 0 for number in whole), "course")
    _require(course.stepwise_passes <= course.planned_passes < _PASSES_END, "course")
    _require(course.region_rows % REGION_UNIT == 0, "course")
    _require((course.region_rows > 0) == (course.planned_passes > 0), "course")
    _require(type(course.steps) is int and 1 <= course.steps <= STEPS, "course")
    _require(type(course.shuffled) is bool and isinstance(course.why, str), "course")
    _require(isinstance(course.first_window, float) and 1.0 <= course.first_window < math.inf, "course")
    _require(state.step < (course.steps if course.is_stepwise(state.number) else 1), "course")
    so_far = state.so_far
    _require(math.isfinite(so_far.log_likelihood) and 0 <= so_far.n_rows < math.inf and so_far.skipped >= 0, "course")
    if course.is_stepwise(state.number):
        _require(len(state.candidates) == 1, "candidates")
        first, under_way = state.candidates[0].mixture, state.step > 0 or bool(state.trees)
        _require((state.before is not None) == under_way, "course")
        _require(state.before is None or state.before.means.shape == first.means.shape, "course")


def _check_candidate(candidate: Candidate) -> None:
    _require(candidate.precision in PRECISIONS, "precision")
    _require(all(isinstance(bound, float) and math.isfinite(bound) for bound in candidate.lower_bounds), "lower_bounds")
    _require(isinstance(candidate.converged, bool), "converged")
    shape = candidate.mixture.means.shape
    behind = (*candidate.trail, *([] if candidate.fallback is None else [candidate.fallback]))
    _require(len(behind) <= 2 and all(mixture.means.shape == shape for mixture in behind), "trail")
    components = range(candidate.mixture.n_components)
    _require(all(type(k) is int and k in components for k in (*candidate.empty, *candidate.degenerate)), "components")


def _check_tree(tree: SummationTree, n_features: int) -> None:
    # Before anything is raised to the power of a level.
    levels = SEGMENTS.bit_length()
    for (level, index), _ in tree.nodes:
        _require(type(level) is int and type(index) is int and 0 <= level < levels, "trees")
        _require(0 <= index < SEGMENTS >> level, "trees")
    _require(sum(1 << level for (level, _), _ in tree.nodes) == len(tree.finished), "trees")
    for _, node in tree.nodes:
        if node is not None:
            _check_statistics(node, n_features)


def _size_of(tree: SummationTree, otherwise: int) -> int:
    """Components of the sums in ``tree``; -1 where they disagree."""
    sizes = {node.n_components for _, node in tree.nodes if node is not None} or {otherwise}
    return sizes.pop() if len(sizes) == 1 else -1


def _check_opened(opened: OpenSegment, sizes: list[int], n_features: int) -> None:
    _require(0 <= opened.segment < SEGMENTS and opened.cursor > 0, "segments under way")
    _require(opened.checksum is None or 0 <= opened.checksum < _CHECKSUM_END, "segments under way")
    _require(0 <= opened.skipped <= opened.cursor, "segments under way")
    for statistics in opened.sums:
        _check_statistics(statistics, n_features)
    _require([statistics.n_components for statistics in opened.sums] == sizes, "segments under way")


def _check_statistics(statistics: Statistics, n_features: int) -> None:
    k = len(statistics.counts)
    shapes: Iterable[tuple[torch.Tensor, tuple[int, ...]]] = (
        (statistics.counts, (k,)),
        (statistics.sums, (k, n_features)),
        (statistics.scatter, scatter_shape(statistics.covariance_type, k, n_features)),
        (statistics.log_likelihood, ()),
        (statistics.n_rows, ()),
        (statistics.shift, (n_features,)),
    )
    for tensor, shape in shapes:
        _require(tuple(tensor.shape) == shape and tensor.dtype == torch.float64, "sums")


def _require(holds: bool, part: str) -> None:
    if not holds:
        raise ValueError(f"its {part} contradict the rest")
