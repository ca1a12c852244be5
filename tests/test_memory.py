"""A plan is made before anything is allocated, and fits the limit or says which limit would do."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.errors import RequestError
from streamgmm.io.plan import plan_chunks
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS, Problem, select_kernel
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.memory import MemoryPlan, Wishes, _chunk_bytes, plan_fit, plan_inference, statistics_bytes
from streamgmm.precision import CHECK_ROWS
from streamgmm.seeding import sample_size
from streamgmm.statistics import BLOCK_ROWS, Statistics
from streamgmm.units import parse_bytes
from tests.oracles import COVARIANCE_TYPES

CPU = torch.device("cpu")


class Imagined(Source):
    """A source of any size that holds nothing."""

    name = "imagined"

    def __init__(self, n: int, d: int, dtype: str = "float32") -> None:
        self.shape = (n, d)
        self.dtype = np.dtype(dtype)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        raise AssertionError("planning reads nothing")


def planned(
    source: Source, problem: Problem, limit: int | None, chunk_rows: int | None, workers: int, starts: int = 1
) -> MemoryPlan:
    return plan_fit(source, [problem] * starts, CPU, Wishes(limit, chunk_rows, 4, workers))


@given(
    n=st.integers(1, 10**10),
    d=st.integers(1, 300),
    k=st.integers(1, 300),
    kind=st.sampled_from(COVARIANCE_TYPES),
    dtype=st.sampled_from(["float64", "float32", "uint8"]),
    limit=st.one_of(st.none(), st.integers(1, 1 << 40)),
    chunk_rows=st.one_of(st.none(), st.integers(1, 10**12)),
    workers=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_a_plan_fits_its_limit_and_cuts_only_where_sums_allow(n, d, k, kind, dtype, limit, chunk_rows, workers):
    source, problem = Imagined(n, d, dtype), Problem(k, d, kind)
    try:
        plan = planned(source, problem, limit, chunk_rows, workers)
    except RequestError:
        assert limit is not None
        return
    assert limit is None or plan.needed <= limit
    rows = plan.chunk_rows
    assert BLOCK_ROWS % rows == 0 or rows % BLOCK_ROWS == 0
    for precision in PRECISIONS:
        assert rows % select_kernel(problem, precision, CPU, workers).granule(problem) == 0
    assert plan_chunks(min(n, 3 * BLOCK_ROWS + 1), rows)
    if chunk_rows is not None and chunk_rows >= 4096:
        assert rows <= chunk_rows


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_the_limit_named_in_the_refusal_is_enough(kind):
    source, problem = Imagined(10**6, 64), Problem(50, 64, kind)
    with pytest.raises(RequestError) as caught:
        planned(source, problem, 1, None, 2)
    named = re.search(r"at least (\d+ MiB) is needed", str(caught.value))
    assert named is not None
    assert f"50 {kind} components of 64 features" in str(caught.value)
    assert "raise --memory" in str(caught.value)
    assert planned(source, problem, parse_bytes(named[1]), None, 2)


def test_less_memory_means_smaller_chunks_until_none_is_small_enough():
    source, problem = Imagined(10**9, 8), Problem(10, 8, "diag")
    free = planned(source, problem, None, None, 2)
    limits = (free.needed, free.needed - 1, free.needed - (40 << 20))
    sizes = [planned(source, problem, limit, None, 2).chunk_rows for limit in limits]
    assert sizes[0] == free.chunk_rows
    assert sizes[0] > sizes[1] > sizes[2]


def test_several_starts_need_more():
    source, problem = Imagined(10**5, 32), Problem(20, 32, "full")
    one, four = (planned(source, problem, None, None, 2, n).needed for n in (1, 4))
    assert four > one


def test_models_of_several_sizes_share_a_plan_that_suits_each():
    source, few, many = Imagined(10**5, 32), Problem(2, 32, "diag"), Problem(2000, 32, "diag")
    wishes = Wishes(None, 256, 4, 2)
    both = plan_fit(source, [few, many], CPU, wishes)
    turning = plan_fit(source, [many], CPU, wishes, smaller=[few])
    assert both.needed > max(plan_fit(source, [p], CPU, wishes).needed for p in (few, many))
    for plan in (both, turning):
        assert plan.chunk_rows % TiledKernel(torch.float32, 2).granule(few) == 0


def test_decoders_of_large_stored_chunks_give_way_before_chunks_do():
    source, problem = Imagined(10**7, 64), Problem(16, 64, "diag")
    source.read_granule = 100_000
    wide, tight = (planned(source, problem, limit, None, 2) for limit in (None, 220 << 20))
    assert wide.threads == 4
    assert tight.threads < 4
    assert tight.needed <= 220 << 20


def test_a_stored_chunk_is_not_cut_without_need():
    source, problem = Imagined(10**7, 8), Problem(16, 8, "diag")
    source.read_granule = 1 << 20
    assert planned(source, problem, None, None, 2).chunk_rows == 1 << 20


def test_ranking_several_components_needs_more_than_naming_the_best():
    source, problem, wishes = Imagined(10**6, 8), Problem(500, 8, "diag"), Wishes(None, 65_536, 4, 2)
    kernel = TiledKernel(torch.float32, 2)
    none, one, two = (plan_inference(source, problem, CPU, wishes, kernel, 24, top).needed for top in (0, 1, 2))
    assert none == one < two
    # Each worker sorts a tile of 64-bit indices and densities.
    assert two - one >= 2 * kernel.granule(problem) * 500 * 12


def test_bfloat16_moves_two_bytes_a_value_and_is_sampled_as_float32():
    problem = Problem(4, 300, "diag")
    for chunk_rows, sampled in ((1 << 18, CHECK_ROWS), (1 << 12, sample_size(10**6, 300, 4))):
        bfloat16, float16 = (planned(Imagined(10**6, 300, t), problem, None, chunk_rows, 2) for t in ("V2", "f2"))
        assert bfloat16.chunk_rows == float16.chunk_rows == chunk_rows
        assert bfloat16.needed - float16.needed == 2 * 300 * sampled


def test_a_sample_that_was_asked_for_is_planned_for_and_named_where_it_is_too_large():
    source, problem = Imagined(10**8, 32), Problem(64, 32, "diag")

    def needed(limit: int | None, sampled: int | None) -> int:
        return plan_fit(source, [problem], CPU, Wishes(limit, 4096, 4, 2), sampled=sampled).needed

    assert needed(None, 10**6) - needed(None, 10**5) > 9 * 10**5 * 32 * 4
    with pytest.raises(RequestError, match=r"lower --sample-rows \(now 1000000\)"):
        needed(needed(None, 10**5), 10**6)


def test_growing_on_the_sample_counts_too():
    source, problem, wishes = Imagined(10**6, 32), Problem(64, 32, "diag"), Wishes(None, 4096, 4, 2)
    plain, growing = (plan_fit(source, [problem], CPU, wishes, growth=growth).needed for growth in (0, 64 << 20))
    assert growing > plain
    assert growing > 64 << 20


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_bytes_of_the_sums(covariance):
    empty = Statistics.zeros(covariance, 5, torch.zeros(3))
    held = [empty.counts, empty.sums, empty.scatter]
    assert statistics_bytes(Problem(5, 3, covariance)) == sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_threads_that_take_no_memory_do_not_give_way(device):
    source, problem = Imagined(10**7, 64), Problem(16, 64, "diag")
    wishes = [Wishes(limit, None, 12, 2) for limit in (None, 300 << 20)]
    wide, tight = (
        plan_inference(source, problem, torch.device(device), w, TiledKernel(torch.float32, 2), 8) for w in wishes
    )
    assert tight.chunk_rows <= wide.chunk_rows
    assert tight.needed <= 300 << 20
    assert (wide.threads, tight.threads) == (12, 12)


@pytest.mark.parametrize(
    ("limit", "there", "host", "expected"),
    [
        (None, 140 << 30, None, 1 << 30),
        (None, 24 << 30, None, 768 << 20),
        (4 << 30, 140 << 30, None, 256 << 20),
        (64 << 30, 140 << 30, 16 << 30, 512 << 20),
        (None, 140 << 30, 1 << 20, 256 << 20),
    ],
)
def test_chunks_of_a_gpu_are_large_where_memory_is(monkeypatch, limit, there, host, expected):
    properties = SimpleNamespace(total_memory=there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert _chunk_bytes(torch.device("cuda"), Wishes(limit, None, 4, 2, host)) == expected
    assert _chunk_bytes(CPU, Wishes(limit, None, 4, 2, host)) == 16 << 20
