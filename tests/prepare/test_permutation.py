from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from streamgmm.prepare.permutation import Permutation


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**62))
def test_every_number_once_and_back(n, seed):
    permutation, numbers = Permutation(n, seed), np.arange(n)
    there = permutation.forward(numbers)
    assert np.array_equal(np.sort(there), numbers)
    assert np.array_equal(permutation.inverse(there), numbers)


def test_beyond_what_a_table_would_hold():
    n = 10**15 + 7
    numbers = np.random.default_rng(0).integers(0, n, 10_000)
    there = Permutation(n, 3).forward(numbers)
    assert there.min() >= 0
    assert there.max() < n
    assert np.array_equal(Permutation(n, 3).inverse(there), numbers)


def test_the_seed_alone_decides():
    numbers = np.arange(1000)
    assert np.array_equal(Permutation(1000, 5).forward(numbers), Permutation(1000, 5).forward(numbers))
    assert (Permutation(1000, 5).forward(numbers) == Permutation(1000, 6).forward(numbers)).mean() < 0.02


@pytest.mark.parametrize("n", [1000, 65_536, 100_003])
def test_neighbours_part(n):
    """Rows that were adjacent are as far apart as any two: |i − j| of independent places has mean n/3."""
    there = Permutation(n, 1).forward(np.arange(n))
    assert abs(np.corrcoef(there[:-1], there[1:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), there)[0, 1]) < 4 / np.sqrt(n)
    distance = np.abs(np.diff(there)) / n
    # Triangular density 2(1 − u) on [0, 1].
    assert stats.kstest(distance, lambda u: 1 - (1 - u) ** 2).pvalue > 1e-4


def test_every_place_is_as_likely():
    """The place of row 3 of 20 over seeds; and the order of two rows."""
    places = np.array([Permutation(20, seed).forward(np.array([3, 11])) for seed in range(4000)])
    assert stats.chisquare(np.bincount(places[:, 0], minlength=20)).pvalue > 1e-4
    pairs = np.bincount(places[:, 0] * 20 + places[:, 1], minlength=400).reshape(20, 20)
    assert stats.chisquare(pairs[~np.eye(20, dtype=bool)]).pvalue > 1e-4
