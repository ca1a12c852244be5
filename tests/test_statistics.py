from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.statistics import BLOCK_ROWS, SEGMENTS, Statistics, SummationTree, segment_bounds
from tests.oracles import COVARIANCE_TYPES


def direct(x: np.ndarray, resp: np.ndarray, shift: np.ndarray, kind: str) -> Statistics:
    """Σ by definition."""
    difference = x - shift
    outer = np.einsum("nk,ni,nj->kij", resp, difference, difference)
    i, j = np.triu_indices(x.shape[1])
    scatter = {
        "full": lambda: outer[:, i, j],
        "tied": lambda: difference.T @ difference,
        "diag": lambda: np.diagonal(outer, axis1=1, axis2=2).copy(),
        "spherical": lambda: np.trace(outer, axis1=1, axis2=2),
    }[kind]()
    tensors = {
        "counts": resp.sum(0),
        "sums": resp.T @ difference,
        "scatter": scatter,
        "log_likelihood": np.array(float(len(x))),
        "n_rows": np.array(float(len(x))),
        "shift": shift,
    }
    return Statistics.from_tensors(tensors, kind)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(n=st.integers(1, 30), k=st.integers(1, 4), d=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_recentre_is_exact(kind, n, k, d, seed):
    rng = np.random.default_rng(seed)
    x, resp = rng.normal(size=(n, d)), rng.dirichlet(np.ones(k), size=n)
    old, new = rng.normal(size=d), rng.normal(size=d)
    moved = direct(x, resp, old, kind).recentre(torch.from_numpy(new))
    expected = direct(x, resp, new, kind)
    for name in ("counts", "sums", "scatter", "shift"):
        torch.testing.assert_close(getattr(moved, name), getattr(expected, name), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_merge_and_round_trip(kind):
    rng = np.random.default_rng(1)
    x, resp, shift = rng.normal(size=(20, 3)), rng.dirichlet(np.ones(2), size=20), rng.normal(size=3)
    whole = direct(x, resp, shift, kind)
    parts = direct(x[:7], resp[:7], shift, kind).merge(direct(x[7:], resp[7:], shift, kind))
    restored = Statistics.from_tensors(parts.tensors("a."), kind, "a.")
    for name in ("counts", "sums", "scatter", "n_rows"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
        assert torch.equal(getattr(restored, name), getattr(parts, name))


@given(st.integers(1, 10**13))
def test_segments_are_contiguous_whole_blocks(n):
    bounds = segment_bounds(n)
    assert len(bounds) == SEGMENTS
    assert bounds[0][0] == 0
    assert bounds[-1][1] == n
    for (_, stop), (start, _) in itertools.pairwise(bounds):
        assert stop == start
        assert start % BLOCK_ROWS == 0 or start == n
    blocks = [-(-(stop - start) // BLOCK_ROWS) for start, stop in bounds]
    assert max(blocks) - min(blocks) <= 1


def leaf(value: float) -> Statistics:
    zeros = Statistics.zeros("spherical", 1, torch.zeros(1))
    return zeros.merge(Statistics.from_tensors({**zeros.tensors(), "counts": np.array([value])}, "spherical"))


def pairwise(values: list[float]) -> float:
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return pairwise(values[:half]) + pairwise(values[half:])


@given(st.lists(st.floats(-1e6, 1e6), min_size=SEGMENTS, max_size=SEGMENTS), st.sets(st.integers(0, SEGMENTS - 1)))
@settings(max_examples=50, deadline=None)
def test_tree_is_the_balanced_pairwise_sum(values, empty):
    tree = SummationTree()
    placed = [i for i in range(SEGMENTS) if i not in empty] or [SEGMENTS - 1]
    for i in placed:
        tree = tree.place(i, leaf(values[i]))
        assert len(tree.nodes) <= SEGMENTS.bit_length()
    # Adding zero changes no bit of a finite sum, so empty segments may count as zeros.
    expected = pairwise([values[i] if i in placed else 0.0 for i in range(SEGMENTS)])
    assert float(tree.total().counts[0]) == expected


def test_tree_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        SummationTree().total()
