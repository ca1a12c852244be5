from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

# A machine that is busy is no failure.
settings.register_profile("streamgmm", deadline=None)
settings.load_profile("streamgmm")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The mark ``gpu`` is all that a test needs to say."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two real workers, started again by their nannies when they die."""
    import distributed  # which takes a second

    with (
        warnings.catch_warnings(action="ignore"),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="2GiB"
        ) as opened,
    ):
        yield opened
