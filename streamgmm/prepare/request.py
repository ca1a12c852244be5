"""What a preparation is asked to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streamgmm.errors import RequestError
from streamgmm.prepare.shards import SHARD_BYTES
from streamgmm.prepare.steps import Step, parse_step

DTYPES = ("float64", "float32", "float16", "int8")


@dataclass(frozen=True)
class PrepareRequest:
    """Settings of `prepare`; all but ``memory``, ``workers`` and ``scheduler`` change the result.

    Attributes
    ----------
    columns : tuple
        Names of a table's columns, or numbers and slices of an array's.
    dtype : str or None
        One of `DTYPES`; None is the source's type where no step computes, else float32.
    ids : bool
        Whether the number of each row in the source is kept beside the rows,
    id_column : str or None
        or what this column of a table calls it.
    """

    steps: tuple[Step, ...] = ()
    columns: tuple[str | int | slice, ...] = ()
    dtype: str | None = None
    shuffle: bool = False
    holdout: float = 0.0
    ids: bool = False
    id_column: str | None = None
    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    memory: int = 1 << 30
    workers: int | None = None
    scheduler: Any = field(default="threads", compare=False)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not 0 <= self.holdout < 1:
            raise RequestError(f"holdout must be a share of the rows, at least 0 and below 1; got {self.holdout}")
        if self.seed < 0:
            raise RequestError(f"seed must be at least 0; got {self.seed}")
        if self.workers is not None and self.workers < 1:
            raise RequestError(f"workers must be at least 1; got {self.workers}")

    def identity(self, source: str) -> dict[str, object]:
        """What the result depends on, JSON values."""
        return {
            "format": 1,
            "source": source,
            "columns": [_written(column) for column in self.columns],
            "steps": [step.text for step in self.steps],
            "dtype": self.dtype,
            "shuffle": self.shuffle,
            "seed": self.seed if self.shuffle or self.holdout else None,
            "holdout": self.holdout,
            "ids": self.id_column or self.ids,
            "shard size": self.shard_bytes,
        }


def parse_steps(steps: str | Sequence[str | Step]) -> tuple[Step, ...]:
    """Steps as they are written: ``"standardise,pca=32"``, or a list of such texts and `Step` objects.

    Raises
    ------
    RequestError
        No such step, or a value that it cannot take.
    """
    parts = [part for part in steps.split(",") if part.strip()] if isinstance(steps, str) else list(steps)
    return tuple(part if isinstance(part, Step) else parse_step(part) for part in parts)


def parse_columns(columns: str | Sequence[str | int | slice]) -> tuple[str | int | slice, ...]:
    """Columns as they are written: ``"0:64,70"`` or ``"x,y,z"``, or a list of numbers, slices and names."""
    parts = [part.strip() for part in columns.split(",") if part.strip()] if isinstance(columns, str) else list(columns)
    return tuple(_column(part) if isinstance(part, str) else part for part in parts)


def _column(text: str) -> str | int | slice:
    if re.fullmatch(r"\d+", text):
        return int(text)
    found = re.fullmatch(r"(\d*):(\d*)", text)
    return slice(*(int(edge) if edge else None for edge in found.groups())) if found else text


def chosen(columns: Sequence[str | int | slice], n_features: int, name: str) -> np.ndarray | None:
    """The numbers among ``columns`` (names were dealt with), (d,) int64; None where there are none.

    Raises
    ------
    RequestError
        A number that is no column, or names and numbers together.
    """
    numbers = [column for column in columns if not isinstance(column, str)]
    if not numbers:
        return None
    if len(numbers) < len(columns):
        raise RequestError(f"columns must be all names or all numbers; got {', '.join(map(_written, columns))}")
    found: list[int] = []
    for column in numbers:
        inside = list(range(n_features))[column] if isinstance(column, slice) else [int(column)]
        if not inside or not 0 <= min(inside) <= max(inside) < n_features:
            raise RequestError(
                f"columns: {name} has {n_features} features, 0 to {n_features - 1}; got {_written(column)}"
            )
        found += inside
    if len(set(found)) < len(found):
        raise RequestError(f"columns: {max(found, key=found.count)} is named twice; name each once")
    return np.array(found, dtype=np.int64)


def sibling(destination: Path, kind: str) -> Path:
    """``vectors.zarr`` → ``vectors.held-out.zarr``."""
    return destination.with_name(f"{destination.stem}.{kind}{destination.suffix}")


def _written(column: str | int | slice) -> str:
    if not isinstance(column, slice):
        return str(column)
    return f"{'' if column.start is None else column.start}:{'' if column.stop is None else column.stop}"
