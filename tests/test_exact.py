from __future__ import annotations

from math import fsum, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.exact import exact_sum

finite = st.floats(min_value=-1e290, max_value=1e290)


@given(st.lists(finite, max_size=60), st.integers(0, 60))
def test_it_is_that_of_fsum_however_the_numbers_are_cut(numbers, cut):
    array = np.array(numbers, dtype=np.float64)
    assert exact_sum([array[:cut], array[cut:]]) == fsum(numbers)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1.0, 1e300, 1e306])
def test_more_numbers_than_are_summed_at_once_of_every_magnitude(scale):
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(200_003) * np.exp2(rng.integers(-70, 1, 200_003).astype(float)) * scale
    assert exact_sum([numbers]) == fsum(numbers)
    assert exact_sum(np.array_split(rng.permutation(numbers), 7)) == fsum(numbers)


def test_what_cancels_cancels():
    assert exact_sum([np.array([1e200, 1.0, -1e200, 2.0**-60])]) == 1 + 2.0**-60
    assert exact_sum([]) == exact_sum([np.array([])]) == 0.0


def test_what_is_not_finite_is_as_fsum_has_it():
    assert exact_sum([np.array([1.0, -np.inf])]) == -np.inf
    assert isnan(exact_sum([np.array([1.0, np.nan])]))
