"""Components that own no row, and mixtures that grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgmm.errors import RequestError
from streamgmm.fitting import fit
from streamgmm.frame import frame_of
from streamgmm.io.sources.array import ArraySource
from streamgmm.mixture import Mixture, covariance_shape
from streamgmm.request import FitRequest
from streamgmm.seeding import Start
from streamgmm.steps.collapse import POLICIES, repair_policy
from streamgmm.steps.split import DEVIATIONS, deviations, split_heaviest
from tests.oracles import COVARIANCE_TYPES, clustered

ROWS = clustered(9001, 5, 3, spread=1.5).astype(np.float32)


def mixture(kind: str, k: int = 4, d: int = 3) -> Mixture:
    rng = np.random.default_rng(0)
    shape = covariance_shape(kind, k, d)
    roots = rng.normal(size=shape)
    covariances = (
        roots @ np.swapaxes(roots, -1, -2) + np.eye(d) if kind in ("full", "tied") else rng.random(shape) + 0.5
    )
    return Mixture(np.array([0.1, 0.4, 0.2, 0.3]), rng.normal(size=(k, d)), covariances, kind)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_splitting_keeps_weight_and_centre_of_mass(kind):
    before = mixture(kind)
    after = split_heaviest(before, 2)
    assert after.n_components == 6
    np.testing.assert_allclose(after.weights, [0.1, 0.2, 0.2, 0.15, 0.2, 0.15])
    np.testing.assert_allclose(after.weights @ after.means, before.weights @ before.means)
    spread = deviations(before)
    np.testing.assert_allclose(after.means[4] - after.means[1], 2 * DEVIATIONS * spread[1])
    np.testing.assert_allclose(after.means[5] - after.means[3], 2 * DEVIATIONS * spread[3])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_a_mixture_and_leaves_the_rest_alone(kind, policy):
    before = mixture(kind)
    repair = repair_policy(policy, torch.from_numpy(ROWS), frame_of(ROWS, kind))
    assert repair(before, np.array([], dtype=np.int64)) is before
    after = repair(before, np.array([0, 2]))
    assert after.weights.sum() == pytest.approx(1)
    assert after.precisions_cholesky is not None
    if policy == "drop":
        assert after.n_components == 2
        np.testing.assert_array_equal(after.means, before.means[[1, 3]])
    elif policy == "floor":
        assert after is before
    else:
        assert after.n_components == 4
        assert not (after.means[[0, 2]] == before.means[[0, 2]]).any()
        assert len(np.unique(after.means, axis=0)) == 4
    # Nothing is left to build on where every component is empty.
    assert repair(before, np.arange(4)) is before


def test_reseeding_takes_the_least_likely_rows_each_value_once():
    pool = np.concatenate([ROWS, [[50.0, 0, 0]] * 3, [[0, 40.0, 0]]]).astype(np.float32)
    before = mixture("diag")
    after = repair_policy("reseed", torch.from_numpy(pool), frame_of(ROWS, "diag"))(before, np.array([0, 2]))
    np.testing.assert_array_equal(after.means[[0, 2]], [[50, 0, 0], [0, 40, 0]])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_fit_with_an_unreachable_component_ends_well(kind, policy):
    means = ROWS[[0, 3000, 6000, 9000]].astype(np.float64)
    means[2] = 1e5
    shape = covariance_shape(kind, 4, 3)
    precisions = np.broadcast_to(np.eye(3), shape) if kind in ("full", "tied") else np.ones(shape)
    request = FitRequest(
        4, kind, max_iter=40, device="cpu", collapse=policy, start=Start(np.full(4, 0.25), means, precisions)
    )
    result = fit(ArraySource(ROWS), request)
    assert result.history[0]["empty"] == [2]
    assert result.converged
    assert result.mixture.n_components == (3 if policy == "drop" else 4)
    assert (np.abs(result.mixture.means).max() > 1e4) == (policy == "floor")


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_mixture_grows_by_splitting(kind, tmp_path):
    request = FitRequest(1, kind, max_iter=200, tol=1e-2, device="cpu", split_to=5)
    result = fit(ArraySource(ROWS), request, tmp_path)
    assert result.converged
    sizes = [record["n_components"] for record in result.history]
    assert sorted(set(sizes)) == [1, 2, 4, 5] or sorted(set(sizes)) == [2, 4, 5]
    assert result.mixture.n_components == 5
    bounds = np.array(result.lower_bounds)
    same = np.diff(sizes) == 0
    assert (np.diff(bounds)[same & (np.roll(same, 1))] > -1e-4).all()
    assert fit(ArraySource(ROWS), request, tmp_path).mixture.digest == result.mixture.digest


def test_growing_is_refused_where_it_makes_no_sense():
    for changes, message in (
        ({"split_to": 3}, "split_to must be at least n_components, 4; got 3"),
        ({"split_to": 10**6}, "has only 9001 rows"),
        ({"n_components": (2, 4), "split_to": 8}, "single n_components"),
        ({"collapse": "pray"}, "collapse must be one of floor, reseed, split, drop; got 'pray'"),
    ):
        with pytest.raises(RequestError, match=message):
            fit(ArraySource(ROWS), FitRequest(**{"n_components": 4, "device": "cpu", **changes}))
