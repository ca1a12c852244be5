"""The data sets by name: made once, kept in a folder, shuffled, in units of one mean variance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from passes_bench.pictures import dense_sift, image_patches
from passes_bench.synthetic import heavy_tailed, imbalanced
from passes_bench.texts import text_vectors

MAKERS: dict[str, Callable[[], np.ndarray]] = {
    "patches": image_patches,
    "sift": dense_sift,
    "text": text_vectors,
    "heavy": heavy_tailed,
    "imbalanced": imbalanced,
}


@dataclass(frozen=True, eq=False)
class DataSet:
    """Rows to train on, (N, D), and rows held out, float32, both in random order."""

    name: str
    training: np.ndarray
    held_out: np.ndarray


def data_set(name: str, folder: Path, rows: int, held_out: int = 10_000) -> DataSet:
    """At most ``rows`` training rows and ``held_out`` others of the data set ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npy"
    if not path.exists():
        made = MAKERS[name]()
        made -= made.mean(0)
        made /= np.sqrt((made.astype(np.float64) ** 2).mean())
        np.random.default_rng(0).shuffle(made)
        np.save(path, made)
    every = np.load(path, mmap_mode="r")
    held = np.array(every[:held_out])
    return DataSet(name, np.array(every[held_out : held_out + rows]), held)


def sorted_by_cluster(data: DataSet, clusters: int = 64) -> DataSet:
    """The same rows, cluster after cluster: the worst order that a file is likely to have."""
    model = KMeans(clusters, n_init=1, max_iter=20, random_state=0).fit(data.training[:10_000])
    order = np.argsort(model.predict(data.training), kind="stable")
    return DataSet(data.name, data.training[order], data.held_out)
