"""Stepwise updates, against sums over the whole N×K matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from streamgmm.errors import NumericalError
from streamgmm.estep import bind, e_step
from streamgmm.frame import frame_of
from streamgmm.mixture import Mixture
from streamgmm.mstep import m_step
from streamgmm.statistics import Statistics
from streamgmm.steps.stepwise import Schedule, implied_statistics, mixed, step_size, stepwise_update
from tests.oracles import COVARIANCE_TYPES, clustered, em_iteration, log_joint, random_mixture

REG = 1e-3


def sums(x: np.ndarray, mixture: Mixture) -> Statistics:
    bound = bind(mixture, frame_of(x, mixture.covariance_type), "highest", torch.device("cpu"), 1)
    statistics = bound.empty_statistics()
    e_step(torch.from_numpy(x), bound, statistics)
    return bound.frame.restore(bound.finish(statistics))


def moments(x: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean responsibilities (K,), and of x (K, D) and xxᵀ (K, D, D) with them, about the origin."""
    joint = log_joint(x, mixture)
    resp = np.exp(joint - logsumexp(joint, axis=1, keepdims=True)) / len(x)
    return resp.sum(0), resp.T @ x, np.einsum("nk,ni,nj->kij", resp, x, x)


def parameters(s: tuple[np.ndarray, ...], kind: str) -> Mixture:
    """The textbook's M-step from moments about the origin."""
    weights, first, second = s
    d = first.shape[1]
    means = first / weights[:, None]
    full = second / weights[:, None, None] - means[:, :, None] * means[:, None, :]
    covariances = {
        "full": full + REG * np.eye(d),
        "tied": (weights[:, None, None] * full).sum(0) / weights.sum() + REG * np.eye(d),
        "diag": np.diagonal(full, axis1=1, axis2=2) + REG,
        "spherical": np.diagonal(full, axis1=1, axis2=2).mean(1) + REG,
    }[kind]
    return Mixture(weights / weights.sum(), means, covariances, kind)


def assert_same(mixture: Mixture, other: Mixture, tolerance: float = 1e-8) -> None:
    for name in ("weights", "means", "covariances"):
        a, b = getattr(mixture, name), getattr(other, name)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def trained(x: np.ndarray, mixture: Mixture, block: int, schedule: Schedule, seen: int = 0) -> Mixture:
    for start in range(seen, len(x), block):
        rows = x[start : start + block]
        mixture = stepwise_update(mixture, sums(rows, mixture), schedule.step_size(start, len(rows)), REG).mixture
    return mixture


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_against_moments_of_the_whole_matrix(kind):
    x, block, start = clustered(611, 3, 4), 97, random_mixture(kind, 3, 4, spread=1.0)
    schedule = Schedule(150, 600, 400)
    # s is kept here as moments, never recovered from parameters. One full pass first: s must be of some rows.
    s = moments(x, start)
    expected = mixture = parameters(s, kind)
    for first in range(0, len(x), block):
        rows = x[first : first + block]
        gamma = 2 * len(rows) / (150 * 4 ** min(1.0, first / 400) + len(rows))
        s = tuple((1 - gamma) * old + gamma * new for old, new in zip(s, moments(rows, expected), strict=True))
        expected = parameters(s, kind)
    assert_same(trained(x, mixture, block, schedule), expected)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_parameters_and_statistics_determine_each_other(kind, offset):
    mixture = random_mixture(kind, 5, 3)
    mixture = Mixture(mixture.weights, mixture.means + offset, mixture.covariances, kind)
    shift = torch.full((3,), offset + 0.5, dtype=torch.float64)
    statistics = implied_statistics(mixture, REG, shift)
    assert float(statistics.n_rows) == 1.0
    assert_same(m_step(statistics, REG, mixture).mixture, mixture, 1e-12)
    moved = statistics.recentre(shift + 1.0)
    torch.testing.assert_close(implied_statistics(mixture, REG, shift + 1.0).scatter, moved.scatter)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_step_of_one_is_em_on_the_block(kind):
    x, mixture = clustered(300, 3, 4), random_mixture(kind, 3, 4)
    update = stepwise_update(mixture, sums(x, mixture), 1.0, REG)
    assert_same(update.mixture, em_iteration(x, mixture, REG)[0])
    assert update.empty == ()


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_fixed_point_of_em_stays_where_it_is(kind):
    x, mixture = clustered(400, 2, 3, spread=6.0), random_mixture(kind, 2, 3)
    for _ in range(300):
        mixture = m_step(sums(x, mixture), REG, mixture).mixture
    for gamma in (0.01, 0.5, 1.0):
        assert_same(stepwise_update(mixture, sums(x, mixture), gamma, REG).mixture, mixture)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_the_origin_of_the_data_does_not_matter(kind):
    x, mixture = clustered(500, 3, 3), random_mixture(kind, 3, 3)
    far = Mixture(mixture.weights, mixture.means + 1e4, mixture.covariances, kind)
    schedule = Schedule(100, 500, 500)
    there, here = trained(x + 1e4, far, 60, schedule), trained(x, mixture, 60, schedule)
    back = Mixture(there.weights, there.means - 1e4, there.covariances, kind)
    assert_same(back, here, 1e-6)


@settings(deadline=None)
@given(st.floats(1, 1e9), st.floats(1, 1e6), st.floats(1, 1e6))
def test_a_window_has_the_variance_of_a_plain_average(window, block, other):
    gamma = step_size(window, block)
    assert 0 < gamma <= 1
    if gamma < 1:
        assert gamma / (block * (2 - gamma)) == pytest.approx(1 / window, rel=1e-6)
        assert step_size(window + other, block) < gamma
    else:
        assert window <= block * (1 + 1e-9)


@settings(deadline=None)
@given(st.floats(1, 1e6), st.floats(1, 1e3), st.integers(1, 10**9))
def test_windows_grow_from_first_to_last(first, growth, span):
    schedule = Schedule(first, first * growth, span)
    assert schedule.window(0) == pytest.approx(first)
    assert schedule.window(span) == schedule.window(2 * span) == pytest.approx(first * growth)
    assert schedule.window(span // 2) <= schedule.window(span) * (1 + 1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_falling_steps_are_a_plain_average(kind, sizes):
    """γ_t = b_t / Σb at fixed responsibilities gives the sums over all rows."""
    mixture = random_mixture(kind, 2, 2)
    x = clustered(sum(sizes), 2, 2)
    total, seen = None, 0
    for size in sizes:
        rows = x[seen : seen + size]
        block = sums(rows, mixture).recentre(torch.zeros(2))
        seen += size
        past = block if total is None else total
        one = replace(past, **{name: getattr(past, name) / past.n_rows for name in ("counts", "sums", "scatter")})
        total = mixed(one, block, size / seen)
    whole = sums(x, mixture).recentre(torch.zeros(2))
    for name in ("counts", "sums", "scatter"):
        mean = getattr(total, name) / total.n_rows
        torch.testing.assert_close(mean, getattr(whole, name) / seen, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_the_mixture_is_the_whole_state(kind, tmp_path):
    x, start, schedule = clustered(700, 4, 3), random_mixture(kind, 4, 3), Schedule(100, 700, 700)
    whole = trained(x, start, 100, schedule)
    assert trained(x, start, 100, schedule).digest == whole.digest
    half = trained(x[:300], start, 100, schedule)
    half.save(tmp_path / "half")
    assert trained(x, Mixture.load(tmp_path / "half"), 100, schedule, seen=300).digest == whole.digest
    backwards = np.concatenate([x[600:], x[:600]])
    assert trained(backwards, start, 100, schedule).digest != whole.digest


def test_a_component_without_rows_fades_and_keeps_its_shape():
    x, start = clustered(300, 2, 3), random_mixture("diag", 3, 3)
    means = start.means.copy()
    means[1] = 1e4
    mixture = Mixture(start.weights, means, start.covariances, "diag")
    faded = trained(x, mixture, 50, Schedule(100, 300, 300))
    assert 0 < faded.weights[1] < 0.05 * start.weights[1]
    np.testing.assert_allclose(faded.means[1], 1e4)
    np.testing.assert_allclose(faded.covariances[1], start.covariances[1], rtol=1e-6)
    gone = stepwise_update(mixture, sums(x, mixture), 1.0, REG)
    assert gone.empty == (1,)
    np.testing.assert_array_equal(gone.mixture.covariances[1], start.covariances[1])


def test_an_overflow_is_named():
    x, mixture = clustered(50, 2, 2), random_mixture("diag", 2, 2)
    block = sums(x, mixture)
    with pytest.raises(NumericalError, match="overflowed"):
        stepwise_update(mixture, replace(block, sums=block.sums * float("inf")), 0.5, REG)
