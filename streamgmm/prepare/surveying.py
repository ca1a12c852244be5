"""A pass over the rows that finds out how many there are for each output, and what steps must learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamgmm.prepare.job import Job, Noted, noted
from streamgmm.prepare.moments import Moments
from streamgmm.prepare.selection import check_finite
from streamgmm.prepare.steps import FULL, NOTHING
from streamgmm.statistics import segment_bounds
from streamgmm.storage import save_tensors


def survey_path(folder: str, name: str, segment: int) -> Path:
    return Path(folder, name, f"{segment:02d}.safetensors")


def survey_segment(job: Job, segment: int) -> Noted:
    """Counts and moments of one of the 64 segments, summed in row order."""
    survey = job.survey
    assert survey is not None
    start, stop = segment_bounds(job.reference.open().shape[0])[segment]
    path = survey_path(job.folder, survey.name, segment)
    path.parent.mkdir(exist_ok=True)
    if survey.needs == NOTHING and not survey.recipe.drops:
        save_tensors(path, {"rows": _counts(list(survey.recipe.counts(start, stop)))}, {})
        return noted(job.folder, path, stop - start)
    source, counts, total = job.reference.open(), [], None
    for granule in survey.recipe.granules(source, start, stop):
        train, held = granule.masks
        counts.append((int(train.sum()), int(held.sum())))
        if survey.needs == NOTHING:
            continue
        if not survey.lenient:
            check_finite(source, granule, train)
        moments = Moments.of(granule.rows[train].astype(np.float64, copy=False), full=survey.needs == FULL)
        total = moments if total is None else total + moments
    tensors = {} if total is None else total.tensors()
    save_tensors(path, {"rows": _counts(counts), **tensors}, {})
    return noted(job.folder, path, stop - start)


def _counts(counts: list[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(counts, dtype=np.int64).reshape(-1, 2)
