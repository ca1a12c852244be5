from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamgmm import transforms
from tools.children import Children


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in that holds ``x.npy``."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", raw_rows())
    return tmp_path


@pytest.fixture
def small_granules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many granules and reads in few rows."""
    monkeypatch.setattr(transforms, "GRANULE_ROWS", 64)
    monkeypatch.setattr("streamgmm.prepare.selection.READ_BYTES", 8192)


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Commands in processes of their own, which can be killed."""
    with Children() as opened:
        yield opened


def raw_rows(n: int = 3001, d: int = 8, seed: int = 0) -> np.ndarray:
    """Correlated features far from zero, float32."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 50).astype(np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of prepared arrays, but for the manifests' times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and ".zarr" in str(path)
    }
