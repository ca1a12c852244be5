"""Likelihoods of several models in one pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import RequestError
from streamgmm.evaluation import RowSum
from streamgmm.fitting import fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest
from streamgmm.weighting import Weighting
from tests.oracles import clustered, log_joint

ROWS = clustered(70_001, 3, 4, spread=2.0).astype(np.float32)


@given(st.lists(st.integers(1, 600), max_size=6), st.integers(1, 511))
def test_where_rows_are_cut_changes_no_bit(units, last):
    values = np.random.default_rng(0).normal(size=256 * sum(units) + last) * 1e3
    whole, cut, first = RowSum(), RowSum(), 0
    for count in units:
        cut.add(values[first : first + 256 * count])
        first += 256 * count
    cut.add(values[first:])
    whole.add(values)
    assert cut.total == whole.total
    np.testing.assert_allclose(whole.total, values.sum(), rtol=1e-12, atol=1e-6)


def test_criteria_are_those_of_the_definition():
    request = FitRequest(
        (2, 3, 5), "diag", max_iter=4, tol=0.0, device="cpu", holdout=0.2, precision="highest", chunk_rows=8192
    )
    result = fit(ArraySource(ROWS), request)
    held = Weighting(holdout=0.2).held_out(np.arange(len(ROWS)))
    assert result.n_passes == pytest.approx(4 + 1 + 1, abs=0.6)  # sample, four updates, evaluation
    for model in result.models:
        mixture, n = model.mixture, (~held).sum()
        density = np.logaddexp.reduce(log_joint(ROWS.astype(np.float64), mixture), axis=1)
        assert model.evaluation is not None
        assert model.evaluation.n_rows == n
        assert model.evaluation.log_likelihood == pytest.approx(density[~held].mean(), rel=1e-10)
        assert model.held_out == pytest.approx(density[held].mean(), rel=1e-10)
        free = mixture.n_parameters
        assert model.criterion("bic") == pytest.approx(-2 * density[~held].sum() + free * np.log(n), rel=1e-10)
        assert model.criterion("aic") == pytest.approx(-2 * density[~held].sum() + 2 * free, rel=1e-10)
    assert result.best == int(np.argmax([model.held_out or 0 for model in result.models]))


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_sizes_that_share_passes_give_the_bits_of_fits_of_their_own(kind, tmp_path):
    def request(sizes):
        return FitRequest(sizes, kind, max_iter=30, tol=1e-2, n_init=2, seed=5, device="cpu")

    together = fit(ArraySource(ROWS), request((3, 1, 6)), tmp_path / "run")
    assert [model.mixture.n_components for model in together.models] == [3, 1, 6]
    assert len({model.n_iter for model in together.models}) > 1  # not all converge in the same pass
    for size, model in zip((3, 1, 6), together.models, strict=True):
        assert model.mixture.digest == fit(ArraySource(ROWS), request(size)).mixture.digest
    again = fit(ArraySource(ROWS), request((3, 1, 6)), tmp_path / "run")
    assert again.resumed
    assert [m.summary() for m in again.models] == [m.summary() for m in together.models]
    assert again.best == together.best


def test_sizes_that_cannot_be_are_refused():
    for sizes, message in (((), "at least one"), ((3, 3), "each number once"), ((3, 0), "at least 1; got 0")):
        with pytest.raises(RequestError, match=message):
            fit(ArraySource(ROWS), FitRequest(sizes, device="cpu"))
    with pytest.raises(RequestError, match="needs rows that are held out"):
        fit(ArraySource(ROWS), FitRequest((2, 3), criterion="held_out", device="cpu"))
    with pytest.raises(RequestError, match=r"holdout must be a fraction.*got 1\.0"):
        fit(ArraySource(ROWS), FitRequest(2, holdout=1.0, device="cpu"))
