"""What ``tools/memcheck.py`` runs under a sanitizer, in the interpreter with bounds of our own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels import bounds

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def _memcheck():
    path = Path(__file__).parents[2] / "tools/memcheck.py"
    spec = importlib.util.spec_from_file_location("memcheck", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["memcheck"] = importlib.util.module_from_spec(spec)
    before = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
    spec.loader.exec_module(module)
    if before is None:
        del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return module


def _is_short(case) -> bool:
    return case.n_features < 64 and (case.precision == "medium" or case.covariance_type == "diag")


memcheck = _memcheck()
CASES = [
    pytest.param(case, id=str(case), marks=[] if _is_short(case) else [pytest.mark.long]) for case in memcheck.cases()
]


@pytest.mark.parametrize("case", CASES)
def test_every_load_and_store_is_within_an_argument(case, monkeypatch):
    bounds.watch(monkeypatch)
    memcheck.run(case, torch.device("cpu"), checked=True)


@triton.jit
def _one_too_far(x, n, STORE: tl.constexpr):
    place = x + tl.arange(0, 8) + 1
    mask = tl.arange(0, 8) < n
    if STORE:
        tl.store(place, 0.0, mask=mask)
    else:
        tl.load(place, mask=mask)


@pytest.mark.parametrize("store", [False, True])
def test_bounds_see_one_element_beyond(store, monkeypatch):
    bounds.watch(monkeypatch)
    x = torch.zeros(8)
    _one_too_far[(1,)](x, 7, STORE=store)
    with pytest.raises(Exception, match="1 of 8 places belong to no argument"):
        _one_too_far[(1,)](x, 8, STORE=store)
