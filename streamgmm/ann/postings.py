"""Posting lists as they lie in a folder: ``centroids.npy``, ``offsets.npy``, ``ids.npy``, and perhaps ``resp.npy``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DamagedFileError, DataError
from streamgmm.storage import parse_json, read_small

FORMAT = "streamgmm-postings"


@dataclass(frozen=True, eq=False)
class PostingLists:
    """List k holds ``ids[offsets[k]:offsets[k + 1]]``, in the order of the rows.

    Attributes
    ----------
    centroids : (K, D) float32 array
    offsets : (K + 1,) int64 array
    ids : (E,) int64 array
        E entries; a memory map where they come from a folder.
    resp : (E,) float32 array or None
        Each entry's responsibility.
    facts : mapping
        ``n_samples``, ``copies``, ``max_copies``, ``own_ids``, ``policy``, … of ``postings.json``.
    """

    centroids: NDArray[np.float32]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    resp: NDArray[np.float32] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_lists(self) -> int:
        return len(self.centroids)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Entries of each list, (K,)."""
        return np.diff(self.offsets)

    @property
    def max_copies(self) -> int:
        """The lists that one vector is stored in at most."""
        return int(self.facts.get("max_copies", 1))

    def list_ids(self, k: int) -> NDArray[np.int64]:
        """The ids in list ``k``."""
        return self.ids[self.offsets[k] : self.offsets[k + 1]]

    @classmethod
    def load(cls, path: str | Path) -> PostingLists:
        """Open the folder that `assign` wrote; ids stay on disk.

        Raises
        ------
        DataError
            There is no such folder, or a part of it is missing.
        DamagedFileError
            Its parts do not fit together.
        """
        folder = Path(path)
        try:
            facts = parse_json(read_small(folder / "postings.json"))
            parts = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("centroids", "offsets", "ids")}
            resp = folder / "resp.npy"
            # Another format's file may have the same name: nothing is unpickled, here or above.
            parts["resp"] = np.load(resp, mmap_mode="r") if resp.exists() else None
        except OSError as error:
            raise DataError(
                f"{error.filename or folder}: {error.strerror}; give the folder that assign wrote"
            ) from None
        except (ValueError, RecursionError, EOFError):
            raise DamagedFileError(f"{folder}: a part of it is damaged; run assign again with --overwrite") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or not _consistent(**parts):
            raise DamagedFileError(f"{folder}: its parts do not fit together; run assign again with --overwrite")
        centroids, offsets = (np.array(parts[name]) for name in ("centroids", "offsets"))
        return cls(centroids, offsets, parts["ids"], parts["resp"], facts)


def is_postings(path: str | Path) -> bool:
    """Whether ``path`` is a folder that `assign` wrote."""
    return (Path(path) / "postings.json").is_file()


def imbalance(sizes: NDArray[np.int64]) -> float:
    """K Σ size² / (Σ size)²: the length of a random entry's list over the mean length; 1 when all are equal."""
    total = float(sizes.sum())
    return float(len(sizes) * (sizes.astype(np.float64) ** 2).sum() / total**2) if total else 1.0


def _consistent(centroids: np.ndarray, offsets: np.ndarray, ids: np.ndarray, resp: np.ndarray | None) -> bool:
    shapes = centroids.ndim == 2 and offsets.shape == (len(centroids) + 1,) and ids.ndim == 1
    types = centroids.dtype == np.float32 and offsets.dtype == np.int64 and ids.dtype == np.int64
    if not (shapes and types):
        return False
    ordered = offsets[0] == 0 and (np.diff(offsets) >= 0).all() and offsets[-1] == len(ids)
    return bool(ordered) and (resp is None or (resp.shape == ids.shape and resp.dtype == np.float32))
