"""What a preparation holds is bounded, whatever the size of the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench_prepare.py"


@pytest.mark.long
@pytest.mark.parametrize("way", ["prepare --shuffle --ids", "prepare --steps standardise,pca=32"])
def test_growth_stays_within_the_limit(tmp_path, way):
    """Of 256 MiB of rows, in less than that, Dask and its threads counted."""
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(1 << 20, 64))
    rows[:] = np.arange(64)
    rows[:, 0] += np.arange(1 << 20)
    rows.flush()
    command = [sys.executable, BENCH, "--one", way, "--source", tmp_path / "x.npy", "--target", tmp_path / "y.zarr"]
    done = subprocess.run([*map(str, command), "--memory", "256MiB"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["grown"] < 256 << 20
