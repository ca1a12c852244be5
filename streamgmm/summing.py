"""A chunk's rows added to the sums of a state, and compared with what they were in the first pass."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

import torch
from torch import Tensor

from streamgmm.errors import DataError, StreamGMMError
from streamgmm.estep import BoundMixture, e_step_of_runs, kept_form
from streamgmm.feed import Feed
from streamgmm.io.intake import Chunk
from streamgmm.io.integrity import UNIT_BYTES, UNIT_ROWS, fold
from streamgmm.io.plan import Span, parts_of
from streamgmm.io.sources.base import Source
from streamgmm.kernels import Run
from streamgmm.kernels.kept import KeptForm, KeptRows
from streamgmm.passes import regions
from streamgmm.state import OpenSegment, TrainingState
from streamgmm.task import Training
from streamgmm.weighting import without_nonfinite


def add_chunk(
    chunk: Chunk, bound: tuple[BoundMixture, ...], state: TrainingState, training: Training
) -> TrainingState | None:
    """The state with the chunk's rows added to their segments, in place; None where device memory did not suffice."""
    span, weighting, n_samples = chunk.span, training.settings.weighting, training.source.shape[0]
    parts = parts_of(span, state.spans(n_samples))
    try:
        opened = _opened(parts, bound, state)
        rows, skipped, given = _rows_of(chunk, bound, training), 0, weighting.training(span.start, span.stop)
        if isinstance(rows, Tensor) and weighting.skip_nonfinite:
            rows, given, skipped = without_nonfinite(rows, given, torch.from_numpy(state.frame.shift))
        weights = None if given is None else torch.from_numpy(given).to(rows.device)
        arriving = None if chunk.units is None else chunk.units()
        for i, mixture in enumerate(bound):
            sums = zip(parts, (each.sums[i] for each in opened), strict=True)
            runs = [Run(part.start - span.start, part.stop - span.start, own) for part, own in sums]
            e_step_of_runs(rows, mixture, runs, weights)
        # A device is at work on the sums while the checksums are waited for.
        units = None if arriving is None else arriving()
        state, checksum, comparing = _checked(state, span, opened[0].checksum, units, training.source)
        state = replace(state, rows_read=state.rows_read + span.rows)
        # A chunk that several share holds what is left of each: these are closed now, and only their sum counts.
        own = [skipped, *[0] * (len(parts) - 1)]
        added = [
            replace(each, cursor=part.stop, checksum=checksum, skipped=each.skipped + more, comparing=comparing)
            for part, each, more in zip(parts, opened, own, strict=True)
        ]
        return _close(added, bound, state, n_samples)
    except torch.OutOfMemoryError:
        return None


def _opened(parts: list[Span], bound: tuple[BoundMixture, ...], state: TrainingState) -> list[OpenSegment]:
    """The segment of each part, as it is or begun."""
    known = {opened.segment: opened for opened in state.opened}
    missing = sum(part.segment not in known for part in parts)
    begun = zip(*(each.several_empty(missing) for each in bound), strict=True) if missing else iter(())
    return [known.get(part.segment) or OpenSegment(part.segment, part.start, next(begun)) for part in parts]


def form_to_keep(bound: tuple[BoundMixture, ...], training: Training) -> KeptForm | None:
    """The form in which rows may stay on the device for all of ``bound``; None where that is as they are stored."""
    source = training.source
    if training.settings.weighting.skip_nonfinite:
        return None  # which rows are skipped shows in the stored ones alone
    return kept_form(bound, source.shape[1] * source.dtype.itemsize)


def _rows_of(chunk: Chunk, bound: tuple[BoundMixture, ...], training: Training) -> Tensor | KeptRows:
    if chunk.stored is None:
        return chunk.rows
    form = form_to_keep(bound, training)
    assert form is not None, "the feed was told to keep rows as stored"
    return form.rows(chunk.rows, chunk.span.rows, chunk.stored)


def begin_again(segment: int, state: TrainingState, training: Training, feed: Feed) -> TrainingState:
    """Begin a segment again, whose sums may be halfway between two chunks, with smaller chunks.

    Raises
    ------
    StreamGMMError
        They are as small as can be.
    """
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    if not feed.shrink(segment):
        active = ", ".join(f"{c.mixture.n_components} {c.mixture.covariance_type}" for c in state.active)
        raise StreamGMMError(
            f"out of device memory even with chunks of {feed.chunk_rows} rows, for {active} components of "
            f"{training.source.shape[1]} features; use fewer, or a device that is free, and run the same command again"
        )
    training.observer.warn(f"out of device memory: going on with chunks of {feed.chunk_rows} rows; no result changes")
    return replace(state, opened=tuple(opened for opened in state.opened if opened.segment != segment))


def _close(
    added: list[OpenSegment], bound: tuple[BoundMixture, ...], state: TrainingState, n_samples: int
) -> TrainingState:
    """The state with segments placed in the trees if they are whole, and else among those that are opened."""
    stops = {span.segment: span.stop for span in state.spans(n_samples)}
    whole = [each for each in added if each.cursor == stops[each.segment]]
    partly = [each for each in added if each.cursor < stops[each.segment]]
    changed = {each.segment for each in added}
    others = (other for other in state.opened if other.segment not in changed)
    trees = (
        tree.place({each.segment: mixture.finish(each.sums[i]) for each in whole})
        for i, (tree, mixture) in enumerate(zip(state.trees, bound, strict=True))
    )
    skipped = state.skipped + sum(each.skipped for each in whole)
    return replace(state, trees=tuple(trees), opened=(*others, *partly), skipped=skipped)


def _checked(
    state: TrainingState, span: Span, checksum: int | None, units: bytes | None, source: Source
) -> tuple[TrainingState, int | None, bool]:
    """The state with the checksum of every region that ends in ``span`` noted, or compared with the one noted before.

    ``checksum`` is of the rows of the first region that lie before the span, and is given back for the last one, with
    whether it is still to be compared.

    Raises
    ------
    DataError
        The rows of a region are not those of the first pass.
    """
    if units is None:
        return state, None, False
    parts, known = regions(state.course, source.shape[0]), dict(state.checksums)
    place, comparing = bisect_right(parts, span.start, key=lambda part: part[0]) - 1, False
    row = span.start
    while row < span.stop:
        first, last = parts[place]
        stop = min(last, span.stop)
        checksum = 0 if row == first else checksum
        if checksum is not None:
            here, there = (-(-(end - span.start) // UNIT_ROWS) * UNIT_BYTES for end in (row, stop))
            checksum, comparing = fold(checksum, units[here:there]), place in known and stop < last
        whole = first < last == stop
        if whole and checksum is not None and known.setdefault(place, checksum) != checksum:
            raise DataError(
                f"{source.name}: changed since the first pass, between {source.locate(first)} and "
                f"{source.locate(last - 1)}; restore it, or start over with --fresh"
            )
        row, place = stop, place + 1
    if len(known) > len(state.checksums):
        state = replace(state, checksums=tuple(known.items()))
    return state, checksum, comparing
