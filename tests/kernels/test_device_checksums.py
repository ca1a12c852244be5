"""Checksums that a GPU computes are those of the host. (Here for the interpreter, which io's tests do without.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.device_checksums import LANES, device_unit_checksums
from streamgmm.io.integrity import UNIT_ROWS, unit_checksums

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]


def some_rows(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    raw = np.random.default_rng(n * d).integers(0, 256, (n, d * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(n, d)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (255, 5), (256, 1), (513, 7), (1024, 17), (700, 128)])
def test_they_are_those_of_the_host(n, d, dtype, device):
    rows = some_rows(n, d, dtype)
    assert device_unit_checksums(rows.to(device))() == unit_checksums(as_rows(rows))


def test_a_unit_shorter_and_longer_than_all_lanes(device):
    for d in (1, 4 * LANES // UNIT_ROWS, 4 * LANES // UNIT_ROWS + 1):
        rows = some_rows(2 * UNIT_ROWS, d, torch.uint8)
        assert device_unit_checksums(rows.to(device))() == unit_checksums(as_rows(rows))


def test_one_bit_shows_in_its_unit_alone(device):
    rows = some_rows(3 * UNIT_ROWS + 9, 6, torch.float32)
    before = device_unit_checksums(rows.to(device))()
    rows.view(torch.uint8)[UNIT_ROWS + 100, 7] ^= 16
    after = device_unit_checksums(rows.to(device))()
    assert [before[i : i + 4] == after[i : i + 4] for i in range(0, 16, 4)] == [True, False, True, True]


def test_rows_may_change_once_they_are_on_their_way(device):
    rows = some_rows(UNIT_ROWS + 50, 4, torch.float32).to(device)
    expected = unit_checksums(as_rows(rows.cpu()))
    units = device_unit_checksums(rows)
    rows.zero_()
    assert units() == expected
