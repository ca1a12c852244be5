"""VectorChord's table of centroids, from which PostgreSQL builds its index."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.quantizer import Quantizer
from streamgmm.errors import RequestError
from streamgmm.storage import write_atomic

ROOT = 0


def write_vectorchord(path: str | Path, quantizer: Quantizer, table: str = "centroids") -> None:
    """SQL that makes and fills ``table`` (id, parent, vector): a root, and a child of it for each list.

    List k has id k + 1. Feed it to ``psql``, then create the index with
    ``WITH (options = 'build.external.table = ''public.centroids''')``.

    Raises
    ------
    RequestError
        ``table`` is no plain name.
    """
    if not all(part.isidentifier() and part.isascii() for part in table.split(".")):
        raise RequestError(f"table must be a plain name such as public.centroids; got {table!r}")
    text = StringIO()
    text.write(f"CREATE TABLE {table} (id INTEGER NOT NULL UNIQUE, parent INTEGER, vector vector NOT NULL);\n")
    text.write(f"COPY {table} (id, parent, vector) FROM stdin;\n")
    for line in _lines(quantizer.centroids):
        text.write(f"{line}\n")
    text.write("\\.\n")
    write_atomic(Path(path), text.getvalue().encode())


def _lines(centroids: NDArray[np.float32]) -> Iterator[str]:
    yield f"{ROOT}\t\\N\t{_vector(centroids.mean(0, dtype=np.float64).astype(np.float32))}"
    for k, centroid in enumerate(centroids):
        yield f"{k + 1}\t{ROOT}\t{_vector(centroid)}"


def _vector(values: NDArray[np.float32]) -> str:
    # Nine digits give every float32 back.
    return "[" + ",".join(f"{value:.9g}" for value in values.tolist()) + "]"
