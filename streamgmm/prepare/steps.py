"""What can be asked for: a step says what it must know about the rows, and becomes a map once that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from streamgmm.errors import DataError, RequestError
from streamgmm.prepare.moments import Moments
from streamgmm.transforms import Fill, Linear, Normalise, RowMap, Scale

NOTHING, COLUMNS, FULL, LARGEST = "nothing", "columns", "full", "largest"
"""What a step must know: mean and variance of each column, the covariance, the largest value."""


@dataclass(frozen=True)
class Step:
    """One step; ``needs`` is what `fit` must be told, ``linear`` whether moments can be carried through its map."""

    name: ClassVar[str]
    needs: ClassVar[str] = NOTHING
    linear: ClassVar[bool] = False

    def n_out(self, n_features: int) -> int:
        """Features after it, of ``n_features`` before it; RequestError where that is impossible."""
        return n_features

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        """The map, from the moments of the rows that come to it (None where it needs nothing)."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return self.name


@dataclass(frozen=True)
class Drop(Step):
    """Leave out rows that hold NaN or infinity."""

    name = "drop"


@dataclass(frozen=True)
class Impute(Step):
    """Put the column's mean, or ``value``, in place of NaN and infinity."""

    value: float | None = None
    name = "impute"

    @property
    def text(self) -> str:
        return f"impute={'mean' if self.value is None else self.value}"

    @property
    def needs(self) -> str:  # type: ignore[override]
        return COLUMNS if self.value is None else NOTHING

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        if self.value is not None:
            return Fill(np.full(n_features, self.value))
        assert moments is not None
        empty = np.flatnonzero(moments.counts == 0)
        if len(empty):
            raise DataError(f"impute=mean: column {empty[0]} has no finite value; leave it out with --columns")
        return Fill(moments.mean)


@dataclass(frozen=True)
class L2(Step):
    """Divide each row by its Euclidean length; rows of zeros stay."""

    name = "l2"

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        return Normalise()


@dataclass(frozen=True)
class Standardise(Step):
    """Subtract each column's mean and divide by its standard deviation (over n); constant columns become zero."""

    name = "standardise"
    needs = COLUMNS
    linear = True

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        assert moments is not None
        deviation = np.sqrt(moments.variance)
        # What rounding alone makes of a constant, as scikit-learn judges it.
        noise = np.finfo(np.float64).eps * (moments.counts * moments.variance + (moments.counts * moments.mean) ** 2)
        constant = moments.variance <= noise / np.maximum(moments.counts, 1.0)
        return Scale(moments.mean, np.where(constant | (deviation == 0), 1.0, deviation))


@dataclass(frozen=True)
class Pca(Step):
    """The ``d`` directions of largest variance, largest first; signs as in scikit-learn."""

    d: int
    name = "pca"
    needs = FULL
    linear = True

    @property
    def text(self) -> str:
        return f"{self.name}={self.d}"

    def n_out(self, n_features: int) -> int:
        return _fewer(self, self.d, n_features)

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        assert moments is not None
        _, directions = _principal(self, moments, self.d)
        return Linear(moments.mean, directions)


@dataclass(frozen=True)
class Whiten(Pca):
    """The same, each direction scaled to variance one (over n − 1, as scikit-learn's PCA whitens)."""

    name = "whiten"

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        assert moments is not None
        variances, directions = _principal(self, moments, self.d)
        rank = int((variances > variances[0] * n_features * np.finfo(np.float64).eps).sum())
        if rank < self.d:
            raise DataError(f"whiten={self.d}: the rows vary in {rank} directions only; ask for {rank} at most")
        return Linear(moments.mean, directions / np.sqrt(variances))


@dataclass(frozen=True)
class Project(Step):
    """``d`` random directions with independent entries N(0, 1/d), which keep distances on average; seeded."""

    d: int
    seed: int = 0
    name = "project"
    linear = True

    @property
    def text(self) -> str:
        return f"project={self.d}" + (f"@{self.seed}" if self.seed else "")

    def n_out(self, n_features: int) -> int:
        return _fewer(self, self.d, n_features)

    def fit(self, n_features: int, moments: Moments | None) -> RowMap:
        matrix = np.random.default_rng(self.seed).standard_normal((n_features, self.d)) / np.sqrt(self.d)
        return Linear(np.zeros(n_features), matrix)


def parse_step(text: str) -> Step:
    """A step as it is written on the command line, such as ``pca=32``.

    Raises
    ------
    RequestError
        No such step, or a value that it cannot take.
    """
    name, mark, value = text.strip().partition("=")
    if name not in _PARSERS:
        raise RequestError(f"steps must be among {', '.join(EXAMPLES)}; got {text!r}")
    parse, takes_value, needs_value = _PARSERS[name]
    if (mark and not takes_value) or (needs_value and not value):
        example = next(each for each in EXAMPLES if each.split("=")[0] == name)
        raise RequestError(f"step {text!r} must be written as {example}")
    try:
        return parse(value)
    except ValueError:
        raise RequestError(f"step {text!r} needs a number behind the sign, such as {name}=32") from None


EXAMPLES = ("drop", "impute=mean", "impute=0", "l2", "standardise", "pca=32", "whiten=32", "project=32", "project=32@7")


def _impute(value: str) -> Step:
    return Impute(None if value in ("", "mean") else _finite(value))


def _project(value: str) -> Step:
    d, _, seed = value.partition("@")
    return Project(int(d), int(seed or 0))


def _finite(value: str) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(value)
    return number


_PARSERS: dict[str, tuple[Callable[[str], Step], bool, bool]] = {
    "drop": (lambda _: Drop(), False, False),
    "impute": (_impute, True, False),
    "l2": (lambda _: L2(), False, False),
    "standardise": (lambda _: Standardise(), False, False),
    "pca": (lambda value: Pca(int(value)), True, True),
    "whiten": (lambda value: Whiten(int(value)), True, True),
    "project": (_project, True, True),
}
"""How each is read, whether it takes a value, and whether it must have one."""


def _fewer(step: Step, d: int, n_features: int) -> int:
    if not 1 <= d <= n_features:
        raise RequestError(f"step {step.text!r}: must ask for 1 to {n_features} features, which come to it; got {d}")
    return d


def _principal(step: Step, moments: Moments, d: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``d`` largest variances (d,), over n − 1, and their directions (D, d)."""
    n = float(moments.counts[0])
    if n < 2:
        raise DataError(f"step {step.text!r}: needs two rows or more; {n:.0f} came to it")
    variances, directions = np.linalg.eigh(moments.scatter / (n - 1))
    variances, directions = variances[::-1][:d], directions[:, ::-1][:, :d]
    # An eigenvector's sign is anybody's choice; scikit-learn makes its largest entry positive.
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(d)]
    return variances, np.ascontiguousarray(directions * np.where(largest < 0, -1.0, 1.0))
