from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamgmm.ann.listing import stream_lists
from streamgmm.ann.placement import assignments
from streamgmm.ann.policies import Policy
from streamgmm.ann.quantizer import Quantizer, quantizer_of_centroids
from streamgmm.errors import DataError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source
from tests.ann.cases import brute_lists, rows_near


def listed(x: np.ndarray, quantizer: Quantizer, settings: InferenceSettings, start: int = 0) -> np.ndarray:
    parts = list(stream_lists(open_source(x), quantizer, 16, Policy("air"), settings, start))
    firsts = np.cumsum([start, *(len(lists) for _, lists in parts)])[:-1]
    assert [first for first, _ in parts] == firsts.tolist()
    return np.concatenate([lists for _, lists in parts])


def test_lists_are_those_of_the_definition_and_stay_the_callers(
    settings: InferenceSettings, quantizer: Quantizer
) -> None:
    x = rows_near(quantizer.mixture, 5000)
    lists = listed(x, quantizer, replace(settings, chunk_rows=1024))
    expected = brute_lists(x, quantizer.mixture, Policy("air"))
    assert [[int(i) for i in row if i >= 0] for row in lists] == expected


def test_it_goes_on_from_a_row(settings: InferenceSettings, quantizer: Quantizer) -> None:
    x = rows_near(quantizer.mixture, 70_000)
    np.testing.assert_array_equal(listed(x, quantizer, settings, 65_536), listed(x, quantizer, settings)[65_536:])


def test_a_bad_row_is_named_before_its_lists_are_given(settings: InferenceSettings, quantizer: Quantizer) -> None:
    x = rows_near(quantizer.mixture, 20_000)
    x[17_000, 3] = np.nan
    parts = stream_lists(open_source(x), quantizer, 2, Policy("top2"), replace(settings, chunk_rows=4096), 0)
    assert [next(parts)[0] for _ in range(4)] == [0, 4096, 8192, 12_288]
    with pytest.raises(DataError, match="row 17000"):
        next(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["top1", "top2", "soar", "air"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_chunks_and_memory_change_no_bit_on_a_gpu(name: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300_001, 24)) * 20 + 128).clip(0, 255).astype(dtype)
    quantizer = quantizer_of_centroids(x[:1000].astype(np.float64))
    source, settings = open_source(x), InferenceSettings(torch.device("cuda"))
    found = []
    for changed in ({}, {"chunk_rows": 4096}, {"memory_limit": 1 << 30}):
        parts = assignments(source, quantizer, Policy(name), 1.0, replace(settings, **changed))
        found.append(np.concatenate([part.lists for part in parts]))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    exact = ((x[:200, None].astype(np.float64) - quantizer.centroids) ** 2).sum(2)
    own = exact[np.arange(200), found[0][:200, 0]]
    assert (own <= exact.min(1) * (1 + 1e-3) + 1e-6).all()
