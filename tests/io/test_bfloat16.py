"""bfloat16 on a host whose NumPy has no such type."""

from __future__ import annotations

import dask.array
import numpy as np
import pytest
import torch

from streamgmm import GaussianMixture
from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import BFLOAT16, as_rows, as_tensor, type_name, value_dtype, values
from streamgmm.io.sources import open_source
from tests.oracles import COVARIANCE_TYPES, clustered


def every_bfloat16() -> torch.Tensor:
    """All 65,536 of them, (256, 256)."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)


@pytest.mark.parametrize("step", [1, 3, -1])
def test_values_are_the_values_of_every_bfloat16(step):
    stored = every_bfloat16()
    rows = as_rows(stored)[::step, 1::2]
    assert rows.dtype == BFLOAT16
    expected = stored.float().numpy()[::step, 1::2]
    assert values(rows).dtype == value_dtype(rows.dtype) == np.float32
    assert values(rows).view(np.uint32).tobytes() == expected.view(np.uint32).tobytes()


def test_rows_and_tensor_share_memory():
    stored = torch.zeros((3, 2), dtype=torch.bfloat16)
    as_tensor(as_rows(stored))[1, 1] = 1.5
    assert stored[1, 1] == 1.5


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint8"])
def test_other_types_are_what_they_are(dtype):
    x = np.arange(6).reshape(3, 2).astype(dtype)
    assert values(x) is x
    assert value_dtype(x.dtype) == x.dtype
    assert type_name(x.dtype) == dtype
    assert np.shares_memory(as_rows(as_tensor(x)), x)


def test_a_tensor_and_a_file_of_it_are_the_same_data(tmp_path):
    stored = torch.randn((50, 3), generator=torch.Generator().manual_seed(0)).bfloat16()
    np.save(tmp_path / "x.npy", as_rows(stored))
    in_memory, on_disk = open_source(stored), open_source(tmp_path / "x.npy")
    assert on_disk.read_path == "extents"
    assert in_memory.fingerprint == on_disk.fingerprint
    assert in_memory.dtype == on_disk.dtype == BFLOAT16


def test_arrays_of_ml_dtypes_are_read(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    for data in (x, tmp_path / "x.npy", dask.array.from_array(x, chunks=(7, 2))):
        source = open_source(data)
        assert source.dtype == BFLOAT16
        assert source.read(3, 50).tobytes() == x[3:].tobytes()


def test_parts_of_two_types_are_named():
    parts = [torch.zeros((2, 2), dtype=torch.bfloat16), np.zeros((2, 2), np.float32)]
    with pytest.raises(DataError, match="holds float32 where torch tensor holds bfloat16"):
        open_source(parts)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_fit_has_the_bits_of_one_to_the_same_numbers_in_float32(kind):
    stored = torch.from_numpy(clustered(3000, 3, 4)).bfloat16()

    def digest(x: torch.Tensor) -> str:
        return GaussianMixture(3, covariance_type=kind, tol=1e-2, random_state=0, device="cpu").fit(x).mixture_.digest

    assert digest(stored) == digest(stored.float())
