"""Steps become maps: each learns from the rows as the maps before it leave them, in as few passes as that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from streamgmm.io.bfloat16 import BFLOAT16
from streamgmm.io.sources import Source
from streamgmm.parallel import one_blas_thread
from streamgmm.prepare.job import Job, Survey
from streamgmm.prepare.moments import Moments
from streamgmm.prepare.production import Production, shared, task
from streamgmm.prepare.request import PrepareRequest, chosen
from streamgmm.prepare.selection import Ranks, Recipe
from streamgmm.prepare.steps import COLUMNS, FULL, NOTHING, Drop, Impute, Step
from streamgmm.prepare.surveying import survey_path, survey_segment
from streamgmm.statistics import segment_bounds
from streamgmm.storage import load_tensors
from streamgmm.transforms import Linear, RowMap, Select, Transformation, granule_rows


@dataclass(frozen=True, eq=False)
class Learnt:
    """All that must be known before rows are written."""

    recipe: Recipe
    transformation: Transformation
    ranks: Ranks


def learn(job: Job, source: Source, request: PrepareRequest, production: Production) -> Learnt:
    """The maps of ``request``, and the place of every row.

    Raises
    ------
    DataError
        Rows are not finite where they must be, or do not tell what a step wants to learn.
    """
    return _Learner(job, source, request, production).learn()


class _Learner:
    """What is known so far.

    ``moments`` are those of the rows after all ``items``, ``counts`` those of a survey that saw every drop among them;
    None where there are none such.
    """

    def __init__(self, job: Job, source: Source, request: PrepareRequest, production: Production) -> None:
        self._job, self._source, self._request, self._production = job, source, request, production
        self._granule = granule_rows(source.shape[1])
        self._surveys = 0
        self._items: list[RowMap | Drop] = []
        self._moments: Moments | None = None
        self._counts: np.ndarray | None = None

    def learn(self) -> Learnt:
        request, source = self._request, self._source
        columns = chosen(request.columns, source.shape[1], source.name)
        width = source.shape[1] if columns is None else len(columns)
        if columns is not None:
            self._items.append(Select(columns))
        for index, step in enumerate(request.steps):
            if isinstance(step, Drop):
                self._items.append(step)
                self._moments = self._counts = None
            else:
                self._take(step, width, request.steps[index:])
                width = step.n_out(width)
        dtype = prepared_dtype(source, request)
        quantum = self._quantum() if dtype == np.int8 and not as_stored(source, request) else 1.0
        if self._recipe.selects and self._counts is None:
            self._survey(NOTHING)
        maps = tuple(item for item in self._items if isinstance(item, RowMap))
        texts = tuple(step.text for step in request.steps)
        transformation = Transformation(source.shape[1], maps, dtype, quantum, texts)
        ranks = Ranks(source.shape[0], self._granule)
        if self._recipe.selects:
            assert self._counts is not None
            ranks = Ranks.counted(source.shape[0], self._granule, self._counts)
        return Learnt(self._recipe, transformation, ranks)

    @property
    def _recipe(self) -> Recipe:
        return Recipe(tuple(self._items), self._granule, self._request.holdout, self._request.seed)

    def _take(self, step: Step, width: int, rest: tuple[Step, ...]) -> None:
        """``step``, the first of ``rest``, as a map."""
        known = self._moments is not None and (step.needs != FULL or self._moments.scatter.ndim == 2)
        if step.needs != NOTHING and not known:
            self._survey(survey_needs(rest), lenient=isinstance(step, Impute))
        moments = self._moments
        with one_blas_thread:
            each = step.fit(width, moments)
            # Through a product of matrices variances alone do not pass.
            passes = moments is not None and step.linear and (moments.scatter.ndim == 2 or not isinstance(each, Linear))
            self._moments = moments.through(each) if moments is not None and passes else None
        self._items.append(each)

    def _quantum(self) -> float:
        """What one unit of int8 stands for."""
        if self._moments is None or not np.isfinite(self._moments.largest):
            self._survey(COLUMNS)
        assert self._moments is not None
        return self._moments.largest / 127 or 1.0

    def _survey(self, needs: str, *, lenient: bool = False) -> None:
        """One pass: counts, and moments of the training rows, joined in the order of the rows."""
        name = f"survey-{self._surveys}"
        self._surveys += 1
        job = shared(replace(self._job, survey=Survey(name, self._recipe, needs, lenient)))
        bounds = enumerate(segment_bounds(self._source.shape[0]))
        segments = [segment for segment, (start, stop) in bounds if start < stop]
        files = {survey_path("", name, each).as_posix(): task(survey_segment, job, each) for each in segments}
        self._production.make(name, files)
        counts: list[np.ndarray] = []
        total: Moments | None = None
        for segment in segments:
            tensors, _ = load_tensors(survey_path(self._job.folder, name, segment))
            counts.append(tensors.pop("rows"))
            if tensors:
                moments = Moments.from_tensors(tensors)
                total = moments if total is None else total + moments
        self._counts, self._moments = np.concatenate(counts), total


def survey_needs(steps: tuple[Step, ...]) -> str:
    """What a survey before ``steps`` must find out so that as many of them as possible learn from it."""
    linear = next((index for index, step in enumerate(steps) if not step.linear), len(steps)) or 1
    learning = [index for index in range(linear) if steps[index].needs != NOTHING]
    before = steps[: learning[-1] + 1]
    # Moments pass through a projection only with the whole covariance.
    return FULL if any(step.needs == FULL or (step.linear and step.needs == NOTHING) for step in before) else COLUMNS


def prepared_dtype(source: Source, request: PrepareRequest) -> np.dtype[np.generic]:
    """The type of the prepared rows."""
    if request.dtype is not None:
        return np.dtype(request.dtype)
    return source.dtype if as_stored(source, request) else np.dtype(np.float32)


def as_stored(source: Source, request: PrepareRequest) -> bool:
    """Whether values are neither computed nor converted."""
    same = source.dtype != BFLOAT16 and request.dtype in (None, source.dtype.name)
    return same and all(isinstance(step, Drop) for step in request.steps)
