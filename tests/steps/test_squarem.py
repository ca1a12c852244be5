"""SQUAREM, against the formula on whole vectors, and through the loop: monotone, resumable, the same for any ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.checkpoint import newest
from streamgmm.errors import RequestError
from streamgmm.fitting import assist, fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.mixture import Mixture
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start
from streamgmm.statistics import Statistics
from streamgmm.steps.candidate import Candidate
from streamgmm.steps.squarem import Squarem, extrapolated
from tests.kills import Killed, KilledAt
from tests.oracles import COVARIANCE_TYPES, clustered, em_iteration, random_mixture
from tests.worlds import run_world

ROWS = clustered(70_001, 4, 3, spread=1.0).astype(np.float32)
FEW = clustered(600, 3, 3, spread=1.5)


def iterates(kind: str, seed: int = 0) -> list[Mixture]:
    found = [random_mixture(kind, 3, 3, seed, spread=1.5)]
    for _ in range(2):
        found.append(em_iteration(FEW, found[-1], 1e-6)[0])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_spherical_moves_are_those_of_the_formula(seed):
    three = iterates("spherical", seed)
    sigma, weights = np.sqrt(three[2].covariances)[:, None], three[2].weights
    x0, x1, x2 = (
        np.concatenate([np.log(m.weights)[:, None], m.means / sigma, np.log(m.covariances)[:, None] / 2], 1)
        for m in three
    )
    r, v = x1 - x0, x2 - 2 * x1 + x0
    length = [np.sqrt((weights[:, None] * each**2).sum()) for each in (r, v)]
    alpha = -min(4.0, max(1.0, length[0] / length[1]))
    expected = x2 + np.clip(x0 - 2 * alpha * r + alpha**2 * v - x2, -1, 1)
    found = extrapolated(*three)
    assert found is not None
    np.testing.assert_allclose(found.weights, np.exp(expected[:, 0]) / np.exp(expected[:, 0]).sum(), rtol=1e-9)
    np.testing.assert_allclose(found.means, expected[:, 1:-1] * sigma, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.covariances, np.exp(2 * expected[:, -1]), rtol=1e-9)


@given(st.sampled_from(COVARIANCE_TYPES), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_any_three_mixtures_lead_to_a_proper_one_not_far_away(kind, seed):
    three = [random_mixture(kind, 3, 3, seed + i, spread=10.0) for i in range(3)]
    found = extrapolated(*three)
    assert found is not None
    assert found.weights.sum() == pytest.approx(1.0)
    if kind in ("full", "tied"):
        assert (np.linalg.eigvalsh(found.covariances) > 0).all()
    else:
        ratio = found.covariances / three[2].covariances
        assert ratio.max() <= np.exp(2) * (1 + 1e-9)
        assert ratio.min() >= np.exp(-2) * (1 - 1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_fixed_point_stays_where_it_is(kind):
    mixture = random_mixture(kind, 3, 3)
    found = extrapolated(mixture, mixture, mixture)
    assert found is not None
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(found, name), getattr(mixture, name), rtol=1e-12, atol=1e-14)


def test_a_component_without_weight_has_nowhere_to_go():
    mixture = random_mixture("diag", 3, 3)
    gone = Mixture(np.array([0.5, 0.5, 0.0]), mixture.means, mixture.covariances, "diag")
    assert extrapolated(gone, mixture, mixture) is None


def with_likelihood(value: float) -> Statistics:
    sums = Statistics.zeros("diag", 3, torch.zeros(3), torch.device("cpu"))
    one = torch.ones((), dtype=torch.float64)
    return replace(sums, log_likelihood=value * one, n_rows=one)


def test_an_extrapolation_that_did_harm_is_undone():
    def step(candidate: Candidate, statistics: Statistics) -> Candidate:
        bound = float(statistics.log_likelihood)
        moved = Mixture(
            candidate.mixture.weights, candidate.mixture.means + 0.01, candidate.mixture.covariances, "diag"
        )
        return replace(candidate, mixture=moved, lower_bounds=(*candidate.lower_bounds, bound))

    squarem, candidate = Squarem(step), Candidate(random_mixture("diag", 3, 3), "high")
    for bound in (-3.0, -2.0):
        candidate = squarem(candidate, with_likelihood(bound))
    safe = candidate.fallback
    assert safe is not None
    assert candidate.result is safe
    assert candidate.mixture is not safe
    undone = squarem(candidate, with_likelihood(-2.5))
    assert undone.mixture is safe
    assert undone.lower_bounds == (-3.0, -2.0, -2.0)
    assert (undone.trail, undone.fallback, undone.converged) == ((), None, False)
    kept = squarem(candidate, with_likelihood(-1.5))
    assert kept.fallback is None
    assert kept.trail == (candidate.mixture,)


# --- through the loop


def request(kind: str = "diag", **changes: object) -> FitRequest:
    # From means that are hardly apart, EM takes long.
    means = ROWS[:4].astype(np.float64) * 0.3
    settings = {"covariance_type": kind, "tol": 0.0, "device": "cpu", "max_iter": 9, "start": Start(means=means)}
    return FitRequest(4, **{**settings, "accelerate": "squarem", **changes})


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_it_never_falls_and_gets_further_than_em(kind):
    fast, plain = (fit(ArraySource(ROWS), request(kind, accelerate=name, max_iter=16)) for name in ("squarem", "none"))
    assert all(b >= a for a, b in zip(fast.lower_bounds, fast.lower_bounds[1:], strict=False))
    assert fast.lower_bounds[:2] == plain.lower_bounds[:2]
    assert fast.lower_bounds[-1] > plain.lower_bounds[-1]
    assert fast.n_passes == plain.n_passes


def test_what_no_pass_has_judged_is_not_the_result():
    safe = fit(ArraySource(ROWS), request(max_iter=2)).mixture
    assert safe.digest == fit(ArraySource(ROWS), request(max_iter=2, accelerate="none")).mixture.digest


@pytest.mark.parametrize("chunks", [28, 37, 44])
def test_killed_anywhere_resumes_to_the_same_bits(chunks, tmp_path):
    whole = fit(ArraySource(ROWS), request())
    often = request(chunk_rows=16_384, checkpoint_every=0.0)
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), often, tmp_path / "run", KilledAt(chunks))
    candidate = newest(tmp_path / "run" / "checkpoints", torch.device("cpu"), print)[0][0].candidates[0]
    assert candidate.trail or candidate.fallback
    resumed = fit(ArraySource(ROWS), request(), tmp_path / "run")
    assert resumed.resumed
    assert resumed.mixture.digest == whole.mixture.digest
    assert resumed.lower_bounds == whole.lower_bounds


def test_a_run_that_may_go_on_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = fit(ArraySource(ROWS), request())
    fit(ArraySource(ROWS), request(max_iter=2), tmp_path / "run")
    assert fit(ArraySource(ROWS), request(), tmp_path / "run").mixture.digest == whole.mixture.digest


def test_several_processes_have_the_bits_of_one():
    def work(world):
        return (fit if world.leads else assist)(ArraySource(ROWS), request(chunk_rows=4096), world=world)

    result = run_world(3, work)[0]
    assert isinstance(result, FitResult), result
    assert result.mixture.digest == fit(ArraySource(ROWS), request()).mixture.digest


def test_it_is_for_mixtures_alone():
    with pytest.raises(RequestError, match="accelerate 'squarem' is for Gaussian mixtures"):
        fit(ArraySource(ROWS), request("spherical", model="kmeans"))
