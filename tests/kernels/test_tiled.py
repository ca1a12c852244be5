from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.frame import Frame, frame_of
from streamgmm.kernels import Problem
from streamgmm.kernels.natural import natural_parameters
from streamgmm.kernels.reference import ReferenceKernel, log_joint
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import BLOCK_ROWS, Statistics
from tests import oracles
from tests.oracles import COVARIANCE_TYPES, clustered, random_mixture

CPU = torch.device("cpu")
NAMES = ("counts", "sums", "scatter", "log_likelihood", "n_rows")


def accumulate(kernel, x: np.ndarray, mixture: Mixture, frame: Frame, cuts: list[int] | None = None) -> Statistics:
    statistics = Statistics.zeros(mixture.covariance_type, mixture.n_components, torch.zeros(x.shape[1]))
    parameters = kernel.parameters(mixture, frame, CPU)
    for rows in torch.from_numpy(x).tensor_split(cuts or []):
        kernel.accumulate(rows.contiguous(), parameters, statistics)
    return statistics


def worst(fast: Statistics, exact: Statistics) -> float:
    """Norm-wise relative error; sums may vanish, so a row's unit deviation is their least scale."""
    least = {"sums": float(exact.n_rows)}
    pairs = ((name, getattr(fast, name), getattr(exact, name)) for name in NAMES)
    return max(float((a - b).norm() / b.norm().clamp(min=least.get(name, 1e-300))) for name, a, b in pairs)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_reference_is_scipys_density(kind):
    x, mixture = clustered(50, 3, 4), random_mixture(kind, 3, 4)
    ours = log_joint(torch.from_numpy(x), mixture).numpy()
    np.testing.assert_allclose(ours, oracles.log_joint(x, mixture), rtol=1e-10)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 1, 1), (997, 1, 3), (997, 3, 1), (1009, 63, 7), (251, 256, 17), (64, 7, 60)]
)
def test_agrees_with_the_reference(kind, dtype, n, k, d):
    x, mixture = clustered(n, k, d), random_mixture(kind, k, d)
    frame = frame_of(x, kind)
    exact = accumulate(ReferenceKernel(), x, mixture, frame)
    fast = accumulate(TiledKernel(dtype), x, mixture, frame)
    bound = 2e-5 if dtype == torch.float32 else 1e-11
    assert worst(fast, exact) < bound
    assert abs(float(fast.counts.sum()) - n) < 0.5
    assert int(fast.n_rows) == n
    kernel = TiledKernel(dtype)
    log_likelihood = kernel.log_likelihood(torch.from_numpy(x), kernel.parameters(mixture, frame, CPU)).numpy()
    expected = np.logaddexp.reduce(oracles.log_joint(x, mixture), axis=1)
    np.testing.assert_allclose(log_likelihood, expected, atol=2e-3 if dtype == torch.float32 else 1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_offset_and_scale_change_nothing(kind, offset, scale):
    x, mixture = clustered(600, 4, 5), random_mixture(kind, 4, 5)
    moved = (scale * (x + offset)).astype(np.float32)
    there = Mixture(mixture.weights, scale * (mixture.means + offset), scale**2 * mixture.covariances, kind)
    resp = log_joint(torch.from_numpy(moved), there).softmax(1)
    fast = accumulate(TiledKernel(torch.float32), moved, there, frame_of(moved, kind))
    np.testing.assert_allclose(fast.counts.numpy(), resp.sum(0).numpy(), rtol=1e-4, atol=1e-4)
    exact = accumulate(ReferenceKernel(), moved, there, frame_of(moved, kind))
    assert worst(fast, exact) < 1e-4


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(data=st.data(), workers=st.sampled_from([1, 2, 4]))
@settings(max_examples=10, deadline=None)
def test_cuts_and_workers_change_no_bit(kind, data, workers):
    x, mixture = clustered(3001, 5, 6).astype(np.float32), random_mixture(kind, 5, 6)
    frame = frame_of(x, kind)
    granule = TiledKernel(torch.float32).granule(Problem(5, 6, kind))
    places = st.lists(st.integers(0, len(x) // granule), max_size=4, unique=True)
    cuts = sorted(granule * place for place in data.draw(places))
    whole = accumulate(TiledKernel(torch.float32, 1), x, mixture, frame)
    pieces = accumulate(TiledKernel(torch.float32, workers), x, mixture, frame, cuts)
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in NAMES)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint8"])
def test_every_stored_type(dtype):
    x = (clustered(500, 3, 4) * 10 + 60).astype(dtype)
    mixture = random_mixture("diag", 3, 4)
    mixture = Mixture(mixture.weights, mixture.means * 10 + 60, mixture.covariances * 100, "diag")
    frame = frame_of(x, "diag")
    exact = accumulate(ReferenceKernel(), x, mixture, frame)
    assert worst(accumulate(TiledKernel(torch.float32), x, mixture, frame), exact) < 1e-5


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_weight_zero_takes_no_rows(kind):
    x, mixture = clustered(300, 3, 4), random_mixture(kind, 3, 4)
    silent = Mixture(np.array([0.5, 0.0, 0.5]), mixture.means, mixture.covariances, kind)
    statistics = accumulate(TiledKernel(torch.float32), x, silent, frame_of(x, kind))
    assert float(statistics.counts[1]) == 0.0
    assert all(torch.isfinite(getattr(statistics, name)).all() for name in NAMES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_row_that_is_not_finite_shows_in_the_likelihood(kind, bad):
    x, mixture = clustered(300, 3, 4), random_mixture(kind, 3, 4)
    frame = frame_of(x, kind)
    x[123, 2] = bad
    assert not torch.isfinite(accumulate(TiledKernel(torch.float32), x, mixture, frame).log_likelihood)


def test_many_small_responsibilities_do_not_stagnate():
    # 2²⁵ + tiny is 2²⁵ in fp32: sums of granules must therefore be fp64.
    x, mixture = clustered(20_000, 2, 3), random_mixture("diag", 2, 3)
    frame = frame_of(x, "diag")
    kernel = TiledKernel(torch.float32)
    begun, fresh = (Statistics.zeros("diag", 2, torch.zeros(3)) for _ in range(2))
    begun.counts.fill_(2.0**25)
    for statistics in (begun, fresh):
        kernel.accumulate(torch.from_numpy(x), kernel.parameters(mixture, frame, CPU), statistics)
    torch.testing.assert_close(begun.counts - 2.0**25, fresh.counts, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_constants_belong_to_the_rounded_parameters(kind):
    """The density that a kernel evaluates integrates to one: it is exact for the parameters it multiplies by."""
    mixture = random_mixture(kind, 3, 4)
    frame = Frame(np.zeros(4), np.ones(4))

    def coarse(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16).astype(np.float64)

    natural = natural_parameters(mixture, frame, coarse)
    for k in range(3):
        precision = np.diag(np.broadcast_to(-2 * natural.quadratic[k], 4)) if kind in ("diag", "spherical") else None
        if kind == "tied":
            precision = natural.common
        if kind == "full":
            upper = np.zeros((4, 4))
            upper[np.triu_indices(4)] = -natural.quadratic[k]
            precision = upper + upper.T
        mean = np.linalg.solve(precision, natural.linear[k])
        log_density = (
            np.log(mixture.weights[k])
            + 0.5 * np.linalg.slogdet(precision)[1]
            - 2 * np.log(2 * np.pi)
            - 0.5 * mean @ precision @ mean
        )
        assert np.isclose(natural.constants[k], log_density, rtol=1e-12)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_granule_divides_a_block(kind):
    for k in (1, 64, 1024, 65_536):
        for d in (1, 64, 768):
            granule = TiledKernel(torch.float32).granule(Problem(k, d, kind))
            assert BLOCK_ROWS % granule == 0
