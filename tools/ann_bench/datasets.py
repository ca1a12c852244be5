"""Real vectors made from what ships with the installed packages: rows to search, and queries from elsewhere.

Windows of one photograph overlap, and a query drawn at random would find its own place, moved by a pixel. So queries
come from a band of each photograph that no searched window touches. The random split is kept beside it, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from passes_bench.pictures import SIFT_WIDTH, photographs, root_sift
from passes_bench.texts import text_vectors
from scipy.ndimage import gaussian_filter, zoom

_SCALES = (1.0, 0.8, 0.64)
_BAND = (0.45, 0.55)
"""Share of a photograph's width that queries come from."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """Rows to search (N, D) and to ask for (Q, D), float32, both in random order."""

    name: str
    rows: np.ndarray
    queries: np.ndarray


def vectors(name: str, folder: Path, n_rows: int, n_queries: int) -> Vectors:
    """At most ``n_rows`` and ``n_queries`` of the set ``name``, made once and kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{part}.npy" for part in ("rows", "queries")]
    if not all(path.exists() for path in paths):
        for path, made in zip(paths, MAKERS[name](), strict=True):
            np.random.default_rng(0).shuffle(made)
            np.save(path, made)
    rows, queries = (np.load(path, mmap_mode="r") for path in paths)
    return Vectors(name, np.array(rows[:n_rows]), np.array(queries[:n_queries]))


def dense_sift() -> tuple[np.ndarray, np.ndarray]:
    """Root-SIFT at every pixel of three scales, (N, 128); queries from the band."""
    return _divided(root_sift, SIFT_WIDTH)


def sift_random() -> tuple[np.ndarray, np.ndarray]:
    """The same descriptors divided at random: queries are their neighbours' places, moved by a pixel."""
    return _at_random(np.concatenate(dense_sift()))


def image_patches() -> tuple[np.ndarray, np.ndarray]:
    """8×8 patches without their mean, (N, 64), at three scales; queries from the band."""
    return _divided(_patches, 8)


def text() -> tuple[np.ndarray, np.ndarray]:
    """TF-IDF of documentation paragraphs on 64 singular vectors, of unit norm, divided at random."""
    rows = text_vectors(64)
    return _at_random(rows / np.linalg.norm(rows, axis=1, keepdims=True))


MAKERS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "sift": dense_sift,
    "patches": image_patches,
    "text": text,
    "sift-random": sift_random,
}


def _at_random(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(1).permutation(rows)
    return rows[10_000:], rows[:10_000]


def _divided(
    windows: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows wholly outside the band, and wholly inside it."""
    outside, inside = [], []
    for image in _scaled():
        first, last = (share * image.shape[1] for share in _BAND)
        found, column = windows(image)
        outside.append(found[(column + width <= first) | (column >= last)])
        inside.append(found[(column >= first) & (column + width <= last)])
    return np.concatenate(outside), np.concatenate(inside)


def _scaled() -> Iterator[np.ndarray]:
    for image in photographs():
        for scale in _SCALES:
            yield image if scale == 1 else zoom(gaussian_filter(image, 0.5 / scale), scale, order=1)


def _patches(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8))
    column = np.broadcast_to(np.arange(windows.shape[1]), windows.shape[:2]).reshape(-1)
    rows = windows.reshape(-1, 64).astype(np.float32)
    return rows - rows.mean(1, keepdims=True), column
