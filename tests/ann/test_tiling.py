from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from streamgmm.ann import tiling
from streamgmm.ann.tiling import Tiling, chunk_rows, fused
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def gpu_tiling(n_lists: int, n_features: int, m: int) -> Tiling:
    with patch.object(tiling, "architecture_of", lambda device: "hopper"):
        return Tiling.of(n_lists, n_features, m, np.dtype("u1"), GPU)


@pytest.mark.parametrize("dtype", ["u1", "i1", "f2", "f4"])
def test_triton_takes_all_rows_of_a_gpu_but_float64(dtype: str) -> None:
    assert fused(np.dtype(dtype), GPU)
    assert not fused(np.dtype("f8"), GPU)
    assert not fused(np.dtype(dtype), CPU)


def test_without_triton_a_gpu_goes_the_plain_way() -> None:
    with patch.object(tiling, "find_spec", lambda name: None):
        assert not fused(np.dtype("u1"), GPU)


@pytest.mark.parametrize(
    ("n_lists", "n_features", "m"), [(1, 1, 1), (4096, 128, 16), (65_536, 1024, 2), (300, 3000, 16)]
)
def test_a_tile_takes_bounded_memory(n_lists: int, n_features: int, m: int) -> None:
    own = gpu_tiling(n_lists, n_features, m)
    assert own.most_rows % own.granule == 0
    assert own.most_rows == own.granule or own.most_rows * own.row_bytes <= 384 << 20
    # No score of a row and a centroid is kept: of each group of centroids two are.
    assert own.row_bytes < 4 * n_lists / 4 + 4 * n_features + 8 * 128 + 2048


def test_the_limit_shrinks_chunks_and_then_refuses() -> None:
    x = open_source(np.zeros((2_000_000, 16), np.uint8))
    own = gpu_tiling(4096, 16, 16)
    sizes = []
    for limit in (None, 512 << 20, 128 << 20):
        settings = InferenceSettings(GPU, memory_limit=limit)
        sizes.append(chunk_rows(x, own, 16, settings, 1))
    assert sizes[0] > sizes[1] > sizes[2] >= own.granule
    with pytest.raises(RequestError, match=r"4096 centroids of 16 features: at least \d+ MiB"):
        chunk_rows(x, own, 16, InferenceSettings(GPU, memory_limit=8 << 20), 1)
