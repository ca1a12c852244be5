from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.ann.nearest import Centroids, nearest
from streamgmm.ann.policies import POLICIES, Policy, lists_of, threshold_for
from streamgmm.errors import RequestError
from tests.ann.cases import brute_lists, overlapping, rows_near


@pytest.mark.parametrize("name", ["top1", "top2", "soar", "air"])
@pytest.mark.parametrize("k", [1, 2, 3, 23])
def test_lists_are_those_of_the_definition(name: str, k: int) -> None:
    mixture = overlapping(k=k)
    x = rows_near(mixture, 200)
    policy = Policy(name)
    centroids = Centroids.of(mixture.means.astype(np.float32), torch.device("cpu"))
    got = lists_of(nearest(torch.from_numpy(x), centroids, min(policy.candidates, k)), policy)
    assert [[int(i) for i in row if i >= 0] for row in got] == brute_lists(x, mixture, policy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int8])
def test_rows_of_every_type(dtype: torch.dtype) -> None:
    mixture = overlapping(k=9)
    x = (torch.from_numpy(rows_near(mixture, 50)) * 10).abs().to(dtype)
    centroids = Centroids.of((mixture.means * 10).astype(np.float32), torch.device("cpu"))
    got = nearest(x, centroids, 3)
    exact = ((x.double()[:, None] - torch.from_numpy(mixture.means * 10).float().double()) ** 2).sum(2)
    np.testing.assert_array_equal(got.lists, exact.argsort(dim=1, stable=True)[:, :3])
    np.testing.assert_allclose(got.distances, exact.sort(dim=1).values[:, :3], rtol=1e-5)


def test_a_row_on_its_centroid_has_one_list_under_a_gate() -> None:
    centroids = Centroids.of(np.eye(4, dtype=np.float32), torch.device("cpu"))
    candidates = nearest(torch.eye(4), centroids, 4)
    assert candidates.distances[:, 0].abs().max() == 0
    assert (lists_of(candidates, Policy("air"))[:, 1] == -1).all()
    # Without a gate every row has two, and nothing is divided by zero.
    assert (lists_of(candidates, Policy("soar")) >= 0).all()


def test_equal_centroids_go_to_the_lower_index() -> None:
    centroids = Centroids.of(np.zeros((5, 3), np.float32), torch.device("cpu"))
    assert (nearest(torch.randn(7, 3), centroids, 5).lists == torch.arange(5)).all()


@given(
    st.lists(st.floats(-0.875, 5, width=32, allow_subnormal=False), min_size=20, max_size=60, unique=True),
    st.floats(1, 2),
)
def test_threshold_gives_the_copies_asked_for(gains: list[float], copies: float) -> None:
    values = torch.tensor(gains)
    threshold = threshold_for(values, copies)
    assert abs(int((values < threshold).sum()) - (copies - 1) * len(gains)) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"name": "top3"}, "policy"),
        ({"name": "top1", "strength": 1.0}, "strength"),
        ({"name": "air", "strength": -1.0}, "strength"),
        ({"name": "air", "strength": float("nan")}, "strength"),
        ({"name": "top1", "threshold": 0.1}, "threshold"),
        ({"name": "resp", "threshold": -0.1}, "threshold"),
        ({"name": "air", "threshold": float("nan")}, "threshold"),
        ({"name": "air", "max_copies": 3}, "max_copies"),
        ({"name": "resp", "max_copies": 0}, "max_copies"),
        ({"name": "air", "candidates": 1}, "candidates"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        Policy(**settings)


def test_every_policy_has_a_default() -> None:
    assert [Policy(name).name for name in POLICIES] == list(POLICIES)
