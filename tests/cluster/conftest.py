from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest

from tests.oracles import clustered

N_ROWS = 140_001  # three blocks in as many segments


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    with distributed.Client(cluster, set_as_default=False) as opened:
        opened.wait_for_workers(2)
        yield opened


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("cluster") / "x.npy"
    np.save(found, clustered(N_ROWS, 4, 4, spread=1.0).astype(np.float32))
    return found
