"""Raw rows, seen as a transformation prepares them."""

from __future__ import annotations

import numpy as np

from streamgmm.errors import DataError, RequestError
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources.base import Rows, Source
from streamgmm.transforms import Transformation, granules

ROWS = ("auto", "raw", "prepared")


class TransformedSource(Source):
    """Rows of ``raw`` after ``transformation``; the same bits as if they had been prepared and stored.

    Rows are never dropped: each raw row has its prepared one. A slow path: every pass transforms again.

    Raises
    ------
    DataError
        The raw rows have another number of features.
    """

    transformation: Transformation
    read_path = "decode"
    slow_because = "its rows are transformed as they are read"

    def __init__(self, raw: Source, transformation: Transformation) -> None:
        if raw.shape[1] != transformation.n_features_in:
            raise DataError(
                f"{raw.name}: has {raw.shape[1]} features and the transformation takes {transformation.n_features_in}; "
                "give raw vectors of that many"
            )
        self._raw = raw
        self.transformation = transformation
        self.name = raw.name
        self.shape = (raw.shape[0], transformation.n_features_out)
        self.dtype = transformation.dtype
        self.read_granule = max(raw.read_granule, transformation.granule)

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        granule = self.transformation.granule
        first = start // granule * granule
        for part in granules(min(-(-stop // granule) * granule, self.shape[0]) - first, granule):
            begin, end = first + part.start, first + part.stop
            rows = self.transformation.mapped(values(self._raw.read(begin, end)))
            low, high = max(start, begin), min(stop, end)
            wanted = rows[low - begin : high - begin]
            # As an integer, what is not finite would look like any other value.
            if self.dtype.kind != "f" and wanted.dtype.kind == "f" and not np.isfinite(wanted).all():
                row = low + int(np.argmin(np.isfinite(wanted).all(axis=1)))
                raise DataError(f"{self._raw.locate(row)}: is not finite; remove or impute rows that are not finite")
            out[low - start : high - start] = self.transformation.store(wanted)

    def files(self) -> list[tuple[str, int, int]]:
        return list(self._raw.files())

    def identity(self) -> object:
        return {"raw": self._raw.identity(), "transformation": self.transformation.digest}

    def close(self) -> None:
        self._raw.close()


def as_fitted(source: Source, transformation: Transformation | None, rows: str = "auto") -> Source:
    """``source`` as the rows that a model was fitted on.

    Parameters
    ----------
    transformation : Transformation or None
        What the model's file holds (`streamgmm.mixture.load_transformation`); None for a model of raw vectors, to which
        every source is given as it is.
    rows : {'auto', 'raw', 'prepared'}
        What ``source`` holds. ``auto``: rows that say how they were prepared are prepared; others are raw if they have
        as many features as raw vectors have, and prepared if they have as many as prepared ones.

    Raises
    ------
    RequestError
        No such ``rows``.
    DataError
        The rows were prepared in another way, or are neither as wide as raw nor as prepared ones.
    """
    if rows not in ROWS:
        raise RequestError(f"rows must be one of {', '.join(ROWS)}; got {rows!r}")
    if transformation is None or rows == "prepared":
        return source
    if rows == "auto" and source.transformation is not None:
        if source.transformation.digest == transformation.digest:
            return source
        raise DataError(
            f"{source.name}: was prepared in another way ({source.transformation.describe()}) than the model's rows "
            f"({transformation.describe()}); give the raw vectors"
        )
    width = source.shape[1]
    if rows == "auto" and width not in (transformation.n_features_in, transformation.n_features_out):
        raise DataError(
            f"{source.name}: has {width} features; the model takes raw vectors of {transformation.n_features_in} or "
            f"prepared ones of {transformation.n_features_out}"
        )
    raw = rows == "raw" or width == transformation.n_features_in
    return TransformedSource(source, transformation) if raw and transformation.changes_values else source
