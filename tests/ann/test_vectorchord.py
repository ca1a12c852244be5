from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamgmm.ann.quantizer import Quantizer, quantizer_of_centroids
from streamgmm.ann.vectorchord import write_vectorchord
from streamgmm.errors import RequestError


def test_a_root_and_a_child_for_each_list(tmp_path: Path) -> None:
    centroids = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    path = tmp_path / "c.sql"
    write_vectorchord(path, quantizer_of_centroids(centroids), "public.centroids")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("CREATE TABLE public.centroids (id INTEGER NOT NULL UNIQUE, parent INTEGER,")
    rows = [line.split("\t") for line in lines[2:-1]]
    assert [(int(row[0]), row[1]) for row in rows] == [(0, "\\N"), *((k + 1, "0") for k in range(5))]
    read = np.array([[float(v) for v in row[2].strip("[]").split(",")] for row in rows], np.float32)
    np.testing.assert_array_equal(read[1:], centroids)
    np.testing.assert_allclose(read[0], centroids.mean(0), rtol=1e-6)
    assert lines[-1] == "\\."


@pytest.mark.parametrize("table", ["", "a b", "x;drop", "é", "a..b"])
def test_names_that_are_none(tmp_path: Path, quantizer: Quantizer, table: str) -> None:
    with pytest.raises(RequestError, match="table"):
        write_vectorchord(tmp_path / "c.sql", quantizer, table)
