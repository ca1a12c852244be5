from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.frame import Frame, frame_of
from streamgmm.io.bfloat16 import as_rows, values
from streamgmm.kernels import Kernel, Problem
from streamgmm.kernels.natural import natural_parameters
from streamgmm.kernels.reference import ReferenceKernel, log_joint
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import BLOCK_ROWS, Statistics
from tests import oracles
from tests.oracles import COVARIANCE_TYPES, clustered, random_mixture

CPU = torch.device("cpu")
NAMES = ("counts", "sums", "scatter", "log_likelihood", "n_rows")


def accumulate(
    kernel: Kernel,
    x: np.ndarray | torch.Tensor,
    mixture: Mixture,
    frame: Frame,
    cuts: list[int] | None = None,
    weights: np.ndarray | None = None,
) -> Statistics:
    statistics = Statistics.zeros(mixture.covariance_type, mixture.n_components, torch.zeros(x.shape[1]))
    parameters = kernel.parameters(mixture, frame, CPU)
    pieces = torch.as_tensor(x).tensor_split(cuts or [])
    own = repeat(None) if weights is None else torch.from_numpy(weights).tensor_split(cuts or [])
    for rows, weight in zip(pieces, own, strict=False):
        kernel.accumulate(rows.contiguous(), parameters, statistics, weight)
    return kernel.finish(statistics, parameters)


def brute_force(x: np.ndarray, mixture: Mixture, frame: Frame, weights: np.ndarray, *, hard: bool) -> Statistics:
    """Weighted statistics in the frame's coordinates, from the whole N×K matrix."""
    joint = oracles.log_joint(x, mixture)
    log_likelihood = joint.max(1) if hard else np.logaddexp.reduce(joint, axis=1)
    one_hot = np.eye(mixture.n_components)[joint.argmax(1)]
    resp = weights[:, None] * (one_hot if hard else np.exp(joint - log_likelihood[:, None]))
    x = (x - frame.shift) * frame.scale
    i, j = np.triu_indices(x.shape[1])
    scatter = {
        "full": lambda: resp.T @ (x[:, i] * x[:, j]),
        "tied": lambda: (weights[:, None] * x).T @ x,
        "diag": lambda: resp.T @ x**2,
        "spherical": lambda: resp.T @ (x**2).sum(1),
    }[mixture.covariance_type]()
    sums = (resp.sum(0), resp.T @ x, scatter, weights @ log_likelihood, weights.sum(), np.zeros(x.shape[1]))
    return Statistics(*(torch.as_tensor(value) for value in sums), mixture.covariance_type)


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
    x, mixture = clustered(13_001, 5, 6).astype(np.float32), random_mixture(kind, 5, 6)
    frame = frame_of(x, kind)
    granule = TiledKernel(torch.float32).granule(Problem(5, 6, kind))
    places = st.lists(st.integers(0, len(x) // granule), max_size=4, unique=True)
    cuts = sorted(granule * place for place in data.draw(places))
    whole = accumulate(TiledKernel(torch.float32, 1), x, mixture, frame)
    pieces = accumulate(TiledKernel(torch.float32, workers), x, mixture, frame, cuts)
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in NAMES)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8], ids=str
)
def test_every_stored_type(dtype):
    x = torch.from_numpy(clustered(500, 3, 4) * 10 + 60).to(dtype)
    mixture = random_mixture("diag", 3, 4)
    mixture = Mixture(mixture.weights, mixture.means * 10 + 60, mixture.covariances * 100, "diag")
    frame = frame_of(values(as_rows(x)), "diag")
    exact = accumulate(ReferenceKernel(), x.double(), mixture, frame)
    for kernel in (ReferenceKernel(), TiledKernel(torch.float32)):
        assert worst(accumulate(kernel, x, mixture, frame), exact) < 1e-5


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_weight_zero_takes_no_rows(kind):
    x, mixture = clustered(300, 3, 4), random_mixture(kind, 3, 4)
    silent = Mixture(np.array([0.5, 0.0, 0.5]), mixture.means, mixture.covariances, kind)
    statistics = accumulate(TiledKernel(torch.float32), x, silent, frame_of(x, kind))
    assert float(statistics.counts[1]) == 0.0
    assert all(torch.isfinite(getattr(statistics, name)).all() for name in NAMES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("hard", [False, True])
def test_a_row_that_is_not_finite_shows_in_the_likelihood(kind, bad, hard):
    x, mixture = clustered(300, 3, 4), random_mixture(kind, 3, 4)
    frame = frame_of(x, kind)
    x[123, 2] = bad
    assert not torch.isfinite(accumulate(TiledKernel(torch.float32, hard=hard), x, mixture, frame).log_likelihood)


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


KERNELS = [ReferenceKernel, lambda hard=False: TiledKernel(torch.float64, 2, hard)]
each_exact_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=["reference", "tiled"])


@each_exact_kernel
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1009, 1, 3), (997, 7, 1), (5003, 13, 5), (251, 256, 4)])
def test_weighted_and_hard_statistics_are_those_of_brute_force(kernel, kind, hard, n, k, d):
    x, mixture = clustered(n, k, d), random_mixture(kind, k, d)
    frame = frame_of(x, kind)
    weights = np.random.default_rng(1).uniform(0, 3, n)
    exact = brute_force(x, mixture, frame, weights, hard=hard)
    assert worst(accumulate(kernel(hard=hard), x, mixture, frame, weights=weights), exact) < 1e-11
    unweighted = brute_force(x, mixture, frame, np.ones(n), hard=hard)
    assert worst(accumulate(kernel(hard=hard), x, mixture, frame), unweighted) < 1e-11


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("hard", [False, True])
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=10, deadline=None)
def test_an_integer_weight_is_a_row_repeated(kind, hard, data, dtype):
    n = data.draw(st.integers(1, 700))
    repeats = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    x, mixture = clustered(n, 3, 4).astype(np.float32), random_mixture(kind, 3, 4)
    frame, kernel = frame_of(x, kind), TiledKernel(dtype, hard=hard)
    narrow = data.draw(st.sampled_from([np.float32, np.float64]))
    weighted = accumulate(kernel, x, mixture, frame, weights=repeats.astype(narrow))
    repeated = accumulate(kernel, x.repeat(repeats, axis=0), mixture, frame)
    assert float(weighted.n_rows) == repeats.sum()
    assert worst(weighted, repeated) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("hard", [False, True])
@given(data=st.data(), workers=st.sampled_from([1, 3]))
@settings(max_examples=8, deadline=None)
def test_cuts_and_workers_change_no_bit_of_weighted_sums(kind, hard, data, workers):
    x, mixture = clustered(13_001, 5, 6).astype(np.float32), random_mixture(kind, 5, 6)
    weights = np.random.default_rng(2).exponential(size=len(x))
    frame = frame_of(x, kind)
    granule = TiledKernel(torch.float32).granule(Problem(5, 6, kind))
    places = st.lists(st.integers(0, len(x) // granule), max_size=4, unique=True)
    cuts = sorted(granule * place for place in data.draw(places))
    whole = accumulate(TiledKernel(torch.float32, 1, hard), x, mixture, frame, weights=weights)
    pieces = accumulate(TiledKernel(torch.float32, workers, hard), x, mixture, frame, cuts, weights)
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in NAMES)


@each_exact_kernel
def test_hard_assignment_is_k_means(kernel):
    # Equal weights and variances: the nearest mean. Multiples of 2⁻¹⁰ make every sum exact.
    rng = np.random.default_rng(4)
    x, means = rng.integers(-9999, 9999, (4999, 3)) / 1024, rng.integers(-9999, 9999, (7, 3)) / 1024
    # Component 5 lies where component 2 does, and takes nothing.
    means[5] = means[2]
    labels = ((x[:, None] - means) ** 2).sum(2).argmin(1)
    mixture = Mixture(np.full(7, 1 / 7), means, np.ones(7), "spherical")
    statistics = accumulate(kernel(hard=True), x, mixture, Frame(np.zeros(3), np.ones(3)))
    one_hot = np.eye(7)[labels]
    assert statistics.counts.tolist() == one_hot.sum(0).tolist()
    assert statistics.counts[5] == 0
    assert statistics.sums.tolist() == (one_hot.T @ x).tolist()
    assert statistics.scatter.tolist() == (one_hot.T @ (x**2).sum(1)).tolist()


@each_exact_kernel
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_top_components_are_those_of_brute_force(kernel, kind, hard, m):
    x, mixture = clustered(5003, 5, 4), random_mixture(kind, 5, 4)
    joint = oracles.log_joint(x, mixture)
    order = np.argsort(-joint, axis=1, kind="stable")
    log_likelihood = joint.max(1) if hard else np.logaddexp.reduce(joint, axis=1)
    resp = np.eye(5)[order[:, 0]] if hard else np.exp(joint - log_likelihood[:, None])
    one = kernel(hard=hard)
    parameters = one.parameters(mixture, frame_of(x, kind), CPU)
    found = one.top(torch.from_numpy(x), parameters, m)
    assert (found.log_likelihood.dtype, found.labels.dtype, found.resp.dtype) == (
        torch.float64,
        torch.int32,
        torch.float32,
    )
    np.testing.assert_array_equal(found.labels.numpy(), order[:, :m])
    np.testing.assert_allclose(found.resp.numpy(), np.take_along_axis(resp, order, 1)[:, :m], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found.log_likelihood.numpy(), log_likelihood, rtol=1e-9)
    assert torch.equal(found.log_likelihood, one.log_likelihood(torch.from_numpy(x), parameters))


@each_exact_kernel
@pytest.mark.parametrize("hard", [False, True])
def test_equal_components_are_ranked_by_index(kernel, hard):
    twin = random_mixture("diag", 2, 3)
    order = [0, 1, 0, 1]
    mixture = Mixture(np.full(4, 0.25), twin.means[order], twin.covariances[order], "diag")
    x = clustered(300, 2, 3)
    one = kernel(hard=hard)
    found = one.top(torch.from_numpy(x), one.parameters(mixture, frame_of(x, "diag"), CPU), 4)
    assert (found.labels[:, 0] < found.labels[:, 1]).all()
    assert (found.labels[:, 1] == found.labels[:, 0] + 2).all()
    assert (found.labels[:, 3] == found.labels[:, 2] + 2).all()
    if hard:
        assert found.resp.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 300
