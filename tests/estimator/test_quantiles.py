"""Quantiles of streamed numbers are those of the sorted array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from streamgmm import GaussianMixture
from streamgmm.errors import RequestError
from streamgmm.estimator.quantiles import quantile
from tests.oracles import clustered

FINITE = st.floats(-1e300, 1e300, allow_subnormal=True)


@given(
    arrays(np.float64, st.integers(1, 60), elements=st.one_of(FINITE, st.sampled_from([0.0, -0.0, 1.0]))),
    st.floats(0, 1),
    st.lists(st.integers(0, 60), max_size=4),
    st.integers(1, 70),
)
@settings(max_examples=150, deadline=None)
def test_is_numpys_quantile(values, q, cuts, in_memory):
    found = quantile(np.split(values, sorted(min(cut, len(values)) for cut in cuts)), len(values), q, in_memory)
    scale = np.abs(values).max()
    assert abs(found - np.quantile(values, q)) <= 1e-15 * scale
    assert values.min() <= found <= values.max()


@pytest.mark.parametrize("q", [0.0, 0.001, 0.5, 2 / 3, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "equal", "two values", "integers"])
def test_many_numbers_beyond_memory(q, kind):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(-400, 20, size=200_000),
        "equal": np.full(200_000, -1.5),
        "two values": np.where(rng.random(200_000) < 0.5, -1.0, 1.0),
        "integers": rng.integers(-50, 50, size=200_000).astype(float),
    }[kind]
    found = quantile(np.array_split(values, 37), len(values), q, in_memory=1000)
    assert np.isclose(found, np.quantile(values, q), rtol=1e-14)


def test_threshold_does_not_depend_on_chunks_and_marks_its_share():
    x = clustered(70_000, 3, 4).astype(np.float32)
    fitted = GaussianMixture(3, random_state=0, covariance_type="diag").fit(x)
    thresholds = {fitted.set_params(chunk_rows=rows).outlier_threshold(x, 0.01) for rows in (1, 4096, 65_536, None)}
    assert len(thresholds) == 1
    (threshold,) = thresholds
    scores = fitted.score_samples(x)
    assert threshold == np.quantile(scores.astype(np.float64), 0.01)
    assert abs((scores < threshold).mean() - 0.01) < 1e-4
    for q in (-0.1, 1.1, float("nan")):
        with pytest.raises(RequestError, match="q must be a number between 0 and 1"):
            fitted.outlier_threshold(x, q)
