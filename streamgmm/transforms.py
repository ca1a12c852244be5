"""Row transforms kept with data and with models: what turns raw vectors into the rows that a model was fitted on."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DamagedFileError
from streamgmm.parallel import one_blas_thread
from streamgmm.storage import load_tensors, parse_tensors, save_tensors

FILE = "transformation.safetensors"
"""Beside the rows, in the folder of their Zarr array."""

GRANULE_ROWS = 4096
_GRANULE_BYTES = 8 << 20

_FORMAT, _VERSION = "streamgmm-transformation", 1

Float64Array = NDArray[np.float64]


def granule_rows(n_features: int) -> int:
    """Rows that are transformed by one call: a power of two, by the dimension alone.

    The bits of a matrix product's row may depend on how many rows stand in it, so that number must not depend on how
    rows are read; nor may the number of threads, which is one.
    """
    fits = max(64, _GRANULE_BYTES // (8 * n_features))
    return int(min(GRANULE_ROWS, 1 << (fits.bit_length() - 1)))


class RowMap(ABC):
    """A function of one row, taken of many; what it learnt from data is in its arrays."""

    kind: ClassVar[str]

    @abstractmethod
    def apply(self, rows: Float64Array) -> Float64Array:
        """Rows (n, D) to (n, d)."""

    @abstractmethod
    def n_out(self, n_features: int) -> int:
        """d, of D."""

    def tensors(self) -> dict[str, np.ndarray]:
        """What it needs to know, by name."""
        return {name: np.asarray(value) for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Select(RowMap):
    """Some of the columns, in the order given; (d,) int64."""

    columns: NDArray[np.int64]
    kind = "select"

    def apply(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, self.columns]

    def n_out(self, n_features: int) -> int:
        return len(self.columns)


@dataclass(frozen=True, eq=False)
class Fill(RowMap):
    """Values (D,) in place of those that are not finite."""

    values: Float64Array
    kind = "fill"

    def apply(self, rows: Float64Array) -> Float64Array:
        return np.where(np.isfinite(rows), rows, self.values)

    def n_out(self, n_features: int) -> int:
        return n_features


@dataclass(frozen=True, eq=False)
class Normalise(RowMap):
    """Rows over their Euclidean length; a row of zeros stays."""

    kind = "normalise"

    def apply(self, rows: Float64Array) -> Float64Array:
        # By the largest value first, so that no square overflows or vanishes.
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scaled = rows / np.where(largest > 0, largest, 1.0)
        length = np.sqrt(np.einsum("nd,nd->n", scaled, scaled))[:, None]
        return np.asarray(scaled / np.where(length > 0, length, 1.0))

    def n_out(self, n_features: int) -> int:
        return n_features


@dataclass(frozen=True, eq=False)
class Scale(RowMap):
    """(x − centre) / scale, both (D,)."""

    centre: Float64Array
    scale: Float64Array
    kind = "scale"

    def apply(self, rows: Float64Array) -> Float64Array:
        return (rows - self.centre) / self.scale

    def n_out(self, n_features: int) -> int:
        return n_features


@dataclass(frozen=True, eq=False)
class Linear(RowMap):
    """(x − centre) · matrix, (D,) and (D, d)."""

    centre: Float64Array
    matrix: Float64Array
    kind = "linear"

    def apply(self, rows: Float64Array) -> Float64Array:
        with one_blas_thread:
            return np.asarray((rows - self.centre) @ self.matrix)

    def n_out(self, n_features: int) -> int:
        return int(self.matrix.shape[1])


_KINDS: dict[str, type[RowMap]] = {each.kind: each for each in (Select, Fill, Normalise, Scale, Linear)}


@dataclass(frozen=True, eq=False)
class Transformation:
    """Raw rows (n, D) to prepared ones (n, d).

    Attributes
    ----------
    n_features_in : int
        D.
    maps : tuple of RowMap
        Taken in order, in fp64.
    dtype : numpy.dtype
        Of the prepared rows.
    quantum : float
        What one unit of an integer ``dtype`` stands for; stored is round(x / quantum).
    steps : tuple of str
        What was asked for, for people.
    """

    n_features_in: int
    maps: tuple[RowMap, ...]
    dtype: np.dtype[np.generic]
    quantum: float = 1.0
    steps: tuple[str, ...] = ()

    @cached_property
    def n_features_out(self) -> int:
        """d."""
        width = self.n_features_in
        for each in self.maps:
            width = each.n_out(width)
        return width

    @property
    def changes_values(self) -> bool:
        """Whether more happens than a change of type."""
        return bool(self.maps) or self.quantum != 1.0

    @property
    def granule(self) -> int:
        """Rows to begin at a multiple of, for the same bits."""
        return granule_rows(self.n_features_in)

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Raw ``rows`` (n, D), numbers of any type, as prepared rows (n, d) of ``dtype``.

        The bits of a row depend on its place among ``rows`` modulo `granule` only.
        """
        out = np.empty((len(rows), self.n_features_out), self.dtype)
        for part in granules(len(rows), self.granule):
            out[part] = self.store(self.mapped(rows[part]))
        return out

    def mapped(self, rows: np.ndarray) -> np.ndarray:
        """One granule of raw rows after every map, before it is stored; what is not finite stays so."""
        with np.errstate(all="ignore"):
            for each in self.maps:
                rows = each.apply(working(rows, each))
        return rows

    def store(self, rows: np.ndarray) -> np.ndarray:
        """Mapped rows as ``dtype``: floats rounded, integers rounded to whole quanta and kept within range."""
        if rows.dtype == self.dtype and self.quantum == 1.0:
            return rows
        with np.errstate(all="ignore"):
            if self.dtype.kind == "f":
                return rows.astype(self.dtype)
            limits = np.iinfo(self.dtype.name)
            # One negative value more than there are positive ones would tilt what lies at the edge.
            low = -limits.max if limits.min else 0
            return np.clip(np.rint(rows / self.quantum), low, limits.max).astype(self.dtype)

    @property
    def facts(self) -> dict[str, object]:
        """All but the arrays, JSON values."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "n_features_in": self.n_features_in,
            "n_features_out": self.n_features_out,
            "maps": [each.kind for each in self.maps],
            "dtype": self.dtype.name,
            "quantum": self.quantum,
            "steps": list(self.steps),
        }

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The arrays by name, for storage."""
        return {
            f"{prefix}{index}.{name}": array
            for index, each in enumerate(self.maps)
            for name, array in each.tensors().items()
        }

    @classmethod
    def from_parts(
        cls, facts: Mapping[str, object], tensors: Mapping[str, np.ndarray], prefix: str = ""
    ) -> Transformation:
        """The inverse of `facts` and `tensors`.

        Raises
        ------
        KeyError, ValueError, TypeError
            They are no such parts.
        """
        kinds, steps = facts["maps"], facts["steps"]
        if facts["format"] != _FORMAT or facts["version"] != _VERSION:
            raise ValueError("an unknown format")
        if not isinstance(kinds, list) or not isinstance(steps, list):
            raise TypeError("its maps are no list")
        maps = []
        for index, kind in enumerate(kinds):
            start = f"{prefix}{index}."
            own = {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
            maps.append(_KINDS[kind](**own))
        whole = cls(
            int(str(facts["n_features_in"])),
            tuple(maps),
            np.dtype(str(facts["dtype"])),
            float(str(facts["quantum"])),
            tuple(map(str, steps)),
        )
        if whole.n_features_out != facts["n_features_out"]:
            raise ValueError("its arrays have other shapes")
        return whole

    @cached_property
    def digest(self) -> str:
        """SHA-256 over `facts` and the arrays' bytes."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name, array in sorted(self.tensors().items()):
            digest.update(f"|{name}|{array.dtype.str}|{array.shape}|".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a checksummed safetensors file."""
        save_tensors(Path(path), self.tensors(), self.facts)

    @classmethod
    def load(cls, path: str | Path) -> Transformation:
        """What `save` wrote.

        Raises
        ------
        DataError
            There is no such file.
        DamagedFileError
            It is not a whole one.
        """
        tensors, facts = load_tensors(Path(path))
        return _checked(path, facts, tensors)

    @classmethod
    def parse(cls, name: str, payload: bytes) -> Transformation:
        """What `save` wrote, from its bytes; ``name`` is for messages. Raises as `load`."""
        tensors, facts = parse_tensors(name, payload)
        return _checked(name, facts, tensors)

    def describe(self) -> str:
        """In a few words: ``64 → 32 features (standardise, pca=32), float16``."""
        steps = f" ({', '.join(self.steps)})" if self.steps else ""
        return f"{self.n_features_in} → {self.n_features_out} features{steps}, {self.dtype.name}"


PREFIX = "transformation."
"""Of the names of its arrays in a model file."""


def transformation_of_model(
    path: Path, metadata: Mapping[str, object], tensors: Mapping[str, np.ndarray]
) -> Transformation | None:
    """What a model file says was done to the rows that it was fitted on; None where it was fitted on raw ones.

    Raises
    ------
    DamagedFileError
        What it says cannot be used.
    """
    facts = metadata.get("transformation")
    return _checked(path, facts, tensors, PREFIX) if isinstance(facts, dict) else None


def granules(n_rows: int, rows: int) -> Iterator[slice]:
    """``n_rows`` rows in slices of ``rows``; the last may be shorter."""
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def working(rows: np.ndarray, each: RowMap) -> np.ndarray:
    """``rows`` as ``each`` takes them: columns are selected from any type, all else works in fp64."""
    return rows if isinstance(each, Select) else rows.astype(np.float64, copy=False)


def _checked(
    path: str | Path, facts: Mapping[str, object], tensors: Mapping[str, np.ndarray], prefix: str = ""
) -> Transformation:
    try:
        return Transformation.from_parts(facts, tensors, prefix)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DamagedFileError(f"{path}: holds no usable transformation ({error}); restore it from a copy") from None
