"""Lloyd's iteration over the stream, against the textbook."""

from __future__ import annotations

import numpy as np
import pytest

from streamgmm.errors import RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start
from tests.oracles import clustered

ROWS = clustered(9001, 5, 7, spread=1.2).astype(np.float32)
CENTRES = ROWS[[3, 1000, 2500, 4000, 6000, 8000, 9000]].astype(np.float64)


def fitted(rows: np.ndarray = ROWS, k: int = 7, **changes: object) -> FitResult:
    settings = {"tol": 0.0, "device": "cpu", "covariance_type": "spherical", "start": Start(means=CENTRES), **changes}
    return fit(ArraySource(rows), FitRequest(k, model="kmeans", **settings))


def nearest(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances = ((x[:, None] - centres) ** 2).sum(-1)
    return distances.argmin(1), distances.min(1)


@pytest.mark.parametrize("precision", ["highest", "auto"])
def test_every_iteration_is_lloyds(precision):
    x, centres = ROWS.astype(np.float64), CENTRES
    for iterations in range(1, 4):
        labels, distances = nearest(x, centres)
        inertia = distances.sum()
        centres = np.stack([x[labels == k].mean(0) for k in range(7)])
        result = fitted(max_iter=iterations, precision=precision)
        np.testing.assert_allclose(result.mixture.means, centres, rtol=1e-4, atol=1e-4)
        assert result.model.inertia == pytest.approx(inertia, rel=1e-4)


def test_it_ends_at_a_fixed_point_with_falling_inertia():
    result = fitted(max_iter=300)
    assert result.converged
    assert (np.diff(result.lower_bounds) >= -1e-9).all()
    labels, distances = nearest(ROWS.astype(np.float64), result.mixture.means)
    np.testing.assert_allclose(
        result.mixture.means, [ROWS[labels == k].mean(0, dtype=np.float64) for k in range(7)], rtol=1e-4, atol=1e-4
    )
    assert result.model.inertia == pytest.approx(distances.sum(), rel=1e-4)


def test_the_tolerance_is_scikit_learns():
    loose, strict = fitted(tol=1e-2, max_iter=300), fitted(tol=1e-6, max_iter=300)
    assert loose.n_iter < strict.n_iter
    before = fitted(tol=0.0, max_iter=loose.n_iter - 1).mixture.means
    moved = ((loose.mixture.means - before) ** 2).sum()
    assert moved <= 1e-2 * ROWS.var(axis=0).mean()


@pytest.mark.parametrize("collapse", ["floor", "reseed", "split", "drop"])
def test_a_centre_without_rows(collapse):
    far = CENTRES.copy()
    far[[1, 4]] = 1e4
    result = fitted(start=Start(means=far), collapse=collapse, max_iter=50)
    assert result.history[0]["empty"] == [1, 4]
    means = result.mixture.means
    if collapse == "floor":
        np.testing.assert_array_equal(means[[1, 4]], far[[1, 4]])
    elif collapse == "drop":
        assert result.mixture.n_components == 5
    else:
        assert np.abs(means).max() < 100
        assert len(set(nearest(ROWS, means)[0])) == 7
    assert len(np.unique(means, axis=0)) >= len(means) - (collapse == "floor")


def test_several_sizes_and_weights():
    weights = np.random.default_rng(0).integers(0, 3, size=len(ROWS))
    from streamgmm.weighting import open_weights

    one = fitted(weights=open_weights(weights, len(ROWS)), max_iter=5)
    other = fitted(np.repeat(ROWS, weights, axis=0), max_iter=5)
    np.testing.assert_allclose(one.mixture.means, other.mixture.means, rtol=1e-4, atol=1e-4)
    assert one.model.inertia == pytest.approx(other.model.inertia, rel=1e-4)
    several = fitted(k=(2, 4), start=Start(), init="k-means++", max_iter=5)
    assert [m.mixture.n_components for m in several.models] == [2, 4]


def test_it_is_spherical():
    with pytest.raises(RequestError, match="'kmeans' is spherical; got covariance_type 'diag'"):
        fitted(covariance_type="diag")


@pytest.mark.parametrize("rows", [np.zeros((10, 2)), np.repeat([[0.0, 1.0], [5.0, 1.0]], 5, axis=0)])
def test_fewer_values_than_centres(rows):
    result = fitted(rows, k=4, start=Start(), max_iter=20)
    assert result.converged
    assert np.isfinite(result.mixture.means).all()
    assert result.model.inertia == pytest.approx(0.0, abs=1e-5 * max(1.0, len(rows) * rows.var()))
