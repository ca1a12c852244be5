from __future__ import annotations

import pytest

from streamgmm.cost import (
    Data,
    Rates,
    flops_per_row,
    kernel_rows,
    pass_seconds,
    slowest,
    stage_seconds,
)
from tools.cost_table import FLOPS, KERNELS


def test_a_pass_takes_its_slowest_stage():
    data = Data(1e9, 100, 2, 4e11)  # twice as many bytes on disk as in memory
    rates = Rates(disk=2e9, source=10e9, link=50e9, rows=1e7, network=1e9, between=0.5)
    stages = stage_seconds(data, rates, processes=8, machines=2, sums_bytes=1e6)
    assert stages == {
        "disk": 4e11 / 4e9,
        "source": 2e11 / 20e9,
        "link": 2e11 / 400e9,
        "kernel": 1e9 / 8e7,
        "reduction": pytest.approx(0.042),
    }
    assert slowest(stages) == "disk"
    assert pass_seconds(stages, rates) == pytest.approx(100 + 0.042 + 0.5)
    alone = stage_seconds(data, Rates(rows=1e7), sums_bytes=1e6)
    assert alone == {"disk": 0, "source": 0, "link": 0, "kernel": 100, "reduction": 0}


def test_more_processes_than_segments_gain_nothing():
    data, rates = Data(1e9, 100, 2, 2e11), Rates(disk=2e9, link=50e9, rows=1e7)
    assert stage_seconds(data, rates, 128, 16) == stage_seconds(data, rates, 64, 8)


def test_work_of_a_row():
    assert flops_per_row(10, 4, "spherical", 0.0) == 80
    assert flops_per_row(10, 4, "diag", 0.5) == 320
    assert flops_per_row(10, 4, "full", 0.0) == 320


@pytest.mark.parametrize(("rows", "k", "d", "covariance", "live", "milliseconds"), KERNELS)
def test_the_kernels_that_were_measured(rows, k, d, covariance, live, milliseconds):
    said = 1e3 * rows / kernel_rows(k, d, covariance, live, FLOPS)
    assert said == pytest.approx(milliseconds, rel=0.2)
