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
    return Statistics.from_tensors({name: torch.from_numpy(array) for name, array in tensors.items()}, kind)


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
    return zeros.merge(
        Statistics.from_tensors({**zeros.tensors(), "counts": torch.tensor([value], dtype=torch.float64)}, "spherical")
    )


def pairwise(values: list[float]) -> float:
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return pairwise(values[:half]) + pairwise(values[half:])


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=SEGMENTS, max_size=SEGMENTS)


def empties(segments: set[int]) -> SummationTree:
    tree = SummationTree()
    for segment in segments:
        tree = tree.place({segment: None})
    return tree


@given(VALUES, st.sets(st.integers(0, SEGMENTS - 1), max_size=SEGMENTS - 1), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_tree_is_the_balanced_pairwise_sum_in_any_order(values, empty, random):
    placed = [i for i in range(SEGMENTS) if i not in empty]
    random.shuffle(placed)
    tree, done = empties(empty), set(empty)
    while placed:
        assert not tree.complete
        several = [placed.pop() for _ in range(random.randint(1, len(placed)))]
        tree = tree.place({i: leaf(values[i]) for i in several})
        done.update(several)
        assert tree.finished == done
    # Adding zero changes no bit of a finite sum, so empty segments may count as zeros.
    expected = pairwise([0.0 if i in empty else values[i] for i in range(SEGMENTS)])
    assert tree.complete
    assert float(tree.total().counts[0]) == expected


@given(VALUES, st.lists(st.integers(0, 3), min_size=SEGMENTS, max_size=SEGMENTS), st.integers(0, SEGMENTS))
@settings(max_examples=50, deadline=None)
def test_who_summed_what_changes_no_bit(values, owners, met):
    """Four ranks; what they have after some segments is merged into the first one's, the rest at the end."""
    trees = [SummationTree() for _ in range(4)]
    for i, (value, owner) in enumerate(zip(values, owners, strict=True)):
        if i == met:
            trees = [trees[0].merge(trees[1]).merge(trees[2]).merge(trees[3]), *(SummationTree() for _ in range(3))]
        trees[owner] = trees[owner].place({i: leaf(value)})
    whole = trees[0].merge(trees[3]).merge(trees[1]).merge(trees[2])
    assert float(whole.total().counts[0]) == pairwise(values)
    assert len(whole.nodes) == 1


def test_runs_of_segments_are_few_nodes():
    tree = SummationTree()
    for i in range(SEGMENTS - 1):
        tree = tree.place({i: leaf(1.0)})
        assert len(tree.nodes) < SEGMENTS.bit_length()


def test_trees_refuse_what_they_cannot_sum():
    with pytest.raises(ValueError, match="64 segments are not summed yet"):
        SummationTree().total()
    with pytest.raises(ValueError, match="no rows"):
        empties(set(range(SEGMENTS))).total()
    tree = SummationTree().place({4: leaf(1.0)}).place({5: leaf(1.0)})
    with pytest.raises(ValueError, match="segment 5 is summed twice"):
        tree.place({5: leaf(1.0)})
    with pytest.raises(ValueError, match="segment 4 is summed twice"):
        SummationTree().place({4: leaf(1.0)}).merge(tree)


def test_a_pass_over_few_rows_has_its_empty_segments_summed():
    tree = SummationTree.over(2 * BLOCK_ROWS + 1)
    assert len(tree.finished) == SEGMENTS - 3
    assert all(sums is None for _, sums in tree.nodes)
