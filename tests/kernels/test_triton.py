"""The Triton E-step on small shapes: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from streamgmm.frame import Frame
from streamgmm.kernels import Problem, Run
from streamgmm.kernels.fused.configs import granule_of, launches_of, stride_of
from streamgmm.kernels.fused.half_form import HalfForm
from streamgmm.kernels.fused.kernel import (
    TritonKernel,
    _bounds,
    _component_bytes,
    _maxima_bytes,
    _moment_bytes,
)
from streamgmm.kernels.fused.parameters import neighbours
from streamgmm.kernels.fused.split_form import SplitForm
from streamgmm.kernels.reference import ReferenceKernel
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import BLOCK_ROWS, Statistics
from tests.kernels.estep_cases import (
    STATISTICS_LIMIT,
    TYPES,
    Case,
    check,
    draw,
    each_kernel,
    errors_of,
    log_likelihood_of,
    relative,
    same_bits,
    sums_of,
)

# The interpreter computes with NumPy, which warns of the infinities that padding is made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@each_kernel
@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 3, 3), (101, 1, 1), (97, 3, 63), (307, 63, 64), (211, 256, 3), (127, 5, 130), (67, 3, 300)]
)
def test_against_fp64(covariance_type, precision, n, k, d, device):
    errors = check(TritonKernel(precision), draw(covariance_type, n, k, d, device))
    # A single row's own rounding is its whole error about its mean.
    if n > 2 * k:
        assert errors.statistics <= STATISTICS_LIMIT[precision], errors


@pytest.mark.long
@each_kernel
@pytest.mark.parametrize("d", [64, 70, 130, 300])
def test_tiles_of_another_architecture(covariance_type, precision, d, device):
    check(TritonKernel(precision, architecture="hopper"), draw(covariance_type, 211, 131, d, device))


@each_kernel
def test_agrees_with_the_textbook(covariance_type, precision, device):
    case = draw(covariance_type, 53, 4, 7, device)
    got, exact = sums_of(TritonKernel(precision), case), sums_of(ReferenceKernel(), case)
    for name in ("counts", "sums", "scatter"):
        assert relative(getattr(got, name), getattr(exact, name)) <= STATISTICS_LIMIT[precision]


@each_kernel
@pytest.mark.parametrize(("offset", "scale"), [(10.0, 1.0), (100.0, 1.0), (1e4, 1.0), (10.0, 1e-3), (1e4, 1e3)])
def test_offset_and_scale(covariance_type, precision, offset, scale, device):
    case = draw(covariance_type, 131, 5, 6, device, offset=offset, scale=scale)
    errors = check(TritonKernel(precision), case)
    assert errors.statistics <= STATISTICS_LIMIT[precision], errors


@each_kernel
def test_cuts_at_granules_keep_the_bits(covariance_type, precision, device, monkeypatch):
    case = draw(covariance_type, 1024 + 77, 3, 5, device)
    # One far row makes fp16 redo its granule, which must not depend on the cut either.
    case.rows[1050] *= 1e4
    kernel = TritonKernel(precision)
    assert kernel.granule(Problem(3, 5, covariance_type)) == 1024
    whole = sums_of(kernel, case)
    assert same_bits(whole, sums_of(kernel, case, [1024, 77]))
    rows = log_likelihood_of(kernel, case)
    # A bounded scratch cuts the rows too, and the components.
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._ROW_BYTES", 1)
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._PARTIAL_BYTES", 1)
    assert same_bits(whole, sums_of(kernel, case))
    assert torch.equal(rows, log_likelihood_of(kernel, case))


@each_kernel
def test_runs_of_one_call_have_the_bits_of_calls(covariance_type, precision, device, monkeypatch):
    case = draw(covariance_type, 2 * 1024 + 77, 3, 5, device)
    case.rows[1050] *= 1e4  # redone in a wider form
    kernel = TritonKernel(precision)
    parameters = kernel.parameters(case.mixture, case.frame, device)
    drawn = torch.rand(len(case.rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = drawn.to(device)
    edges = [0, 1024, 2048, len(case.rows)]

    def empty(n: int) -> tuple[Statistics, ...]:
        return Statistics.several(n, covariance_type, 3, torch.zeros(5, dtype=torch.float64), device)

    expected = empty(3)
    for (first, last), own in zip(pairwise(edges), expected, strict=True):
        kernel.accumulate(case.rows[first:last], parameters, own, weights[first:last])

    def same_in_one_call() -> bool:
        # Behind each other in memory; the first one apart, as of a segment begun before; none where it could share.
        ways = [empty(3), (*empty(1), *empty(2)), empty(3)[::-1]]
        for found in ways:
            runs = [Run(*edge, own) for edge, own in zip(pairwise(edges), found, strict=True)]
            kernel.accumulate_runs(case.rows, parameters, runs, weights)
        return all(same_bits(mine, theirs) for found in ways for mine, theirs in zip(found, expected, strict=True))

    assert same_in_one_call()
    # Scratch for a granule at a time, and for a part of the components.
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._ROW_BYTES", 1)
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._PARTIAL_BYTES", 1)
    assert same_in_one_call()


@each_kernel
def test_scratch_in_pieces_of_components(covariance_type, precision, device, monkeypatch):
    case = draw(covariance_type, 70, 200, 3, device)
    whole = sums_of(TritonKernel(precision), case)
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._PARTIAL_BYTES", 1)
    assert same_bits(whole, sums_of(TritonKernel(precision), case))


@each_kernel
def test_nothing_outside_is_read_or_written(covariance_type, precision, device):
    n, k, d = 67, 3, 5
    case = draw(covariance_type, n, k, d, device)
    kernel = TritonKernel(precision)
    exact = sums_of(kernel, case)
    rows = torch.full((n + 64, d), float("nan"), device=device)
    rows[32 : 32 + n] = case.rows
    fields = {}
    for name in ("counts", "sums", "scatter"):
        shape = getattr(exact, name).shape
        guarded = torch.full((shape[0] + 20, *shape[1:]), 7.0, dtype=torch.float64, device=device)
        guarded[10:-10] = 0
        fields[name] = guarded
    parameters = kernel.parameters(case.mixture, case.frame, device)
    shift = torch.zeros(d, dtype=torch.float64, device=device)
    statistics = replace(
        Statistics.zeros(covariance_type, k, shift, device),
        **{name: guarded[10:-10] for name, guarded in fields.items()},
    )
    kernel.accumulate(rows[32 : 32 + n], parameters, statistics)
    assert same_bits(exact, kernel.finish(statistics, parameters))
    for guarded in fields.values():
        assert (guarded[:10] == 7).all()
        assert (guarded[-10:] == 7).all()


@each_kernel
def test_a_weight_of_zero(covariance_type, precision, device):
    case = draw(covariance_type, 83, 4, 3, device)
    weights = np.array([0.0, 0.5, 0.0, 0.5])
    m = case.mixture
    case = replace(case, mixture=Mixture(weights, m.means, m.covariances, covariance_type))
    statistics = sums_of(TritonKernel(precision), case)
    assert (statistics.counts[[0, 2]] == 0).all()
    assert (statistics.sums[[0, 2]] == 0).all()
    check(TritonKernel(precision), case)


@each_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite(covariance_type, precision, value, device):
    case = draw(covariance_type, 70, 3, 5, device)
    case.rows[41, 2] = value
    rows = log_likelihood_of(TritonKernel(precision), case)
    assert not rows[41].isfinite()
    assert rows.isfinite().sum() == 69
    assert not sums_of(TritonKernel(precision), case).log_likelihood.isfinite()


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.uint8], ids=str)
def test_stored_types(covariance_type, precision, dtype, device):
    offset = {torch.uint8: 128.0, torch.float64: 1e6}.get(dtype, 0.0)
    case = draw(covariance_type, 90, 3, 5, device, offset=offset, spread=20.0, noise=5.0, dtype=dtype)
    errors = check(TritonKernel(precision), case)
    assert errors.statistics <= STATISTICS_LIMIT[precision], errors


@pytest.mark.parametrize("far", [1500.0, 4e4])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_far_rows_are_redone_one_granule_at_a_time(covariance_type, far, device):
    case = draw(covariance_type, 2 * 1024 + 50, 3, 4, device)
    before = log_likelihood_of(TritonKernel("medium"), case)
    case.rows[1100] = far
    kernel = TritonKernel("medium")
    after = log_likelihood_of(kernel, case)
    assert torch.equal(before[:1024], after[:1024])
    assert torch.equal(before[2048:], after[2048:])
    exact = log_likelihood_of(ReferenceKernel(), case)
    assert relative(after[1100], exact[1100]) < 1e-6
    assert errors_of(kernel, case).statistics <= STATISTICS_LIMIT["medium"]


@pytest.mark.parametrize("covariance_type", TYPES)
def test_precisions_beyond_fp16(covariance_type, device):
    # Rows that fp16 holds exactly, so that the range of 1/σ² = 2²⁰ is in question, not the rounding of x'.
    rng = np.random.default_rng(3)
    k, d = 4, 3
    means = rng.integers(-8, 9, (k, d)) / 64
    rows = means[rng.integers(0, k, 200)] + rng.integers(-2, 3, (200, d)) / 1024
    unit = {"spherical": np.ones(k), "diag": np.ones((k, d)), "tied": np.eye(d)}[covariance_type]
    covariances = 2.0**-20 * unit
    mixture = Mixture(np.full(k, 1 / k), means, covariances, covariance_type)
    case = Case(torch.tensor(rows, device=device), mixture, Frame(np.zeros(d), np.ones(d)))
    assert check(TritonKernel("medium"), case).statistics < 1e-6


@each_kernel
def test_small_responsibilities_add_up(covariance_type, precision, device):
    # Two components in one place: every row gives the second 1e-7.
    n, d = 1500, 2
    rows = torch.randn((n, d), generator=torch.Generator().manual_seed(0)).to(device)
    covariances = {"spherical": np.ones(2), "diag": np.ones((2, d)), "tied": np.eye(d)}[covariance_type]
    mixture = Mixture(np.array([1 - 1e-7, 1e-7]), np.zeros((2, d)), covariances, covariance_type)
    counts = sums_of(TritonKernel(precision), Case(rows, mixture, Frame(np.zeros(d), np.ones(d)))).counts
    assert float(counts[1]) == pytest.approx(n * 1e-7, rel=1e-3 if precision == "medium" else 1e-5)


@pytest.mark.parametrize(
    ("covariance_type", "d", "architecture"),
    [
        *((covariance_type, 70, "any") for covariance_type in TYPES),
        *(
            pytest.param(covariance_type, d, "hopper", marks=pytest.mark.long)
            for covariance_type in ("spherical", "diag")
            for d in (130, 300)
        ),
    ],
)
def test_stored_responsibilities_of_weighted_rows(covariance_type, d, architecture, device):
    """Rows of many features: their responsibilities are stored, and granules are summed apart."""
    kernel = TritonKernel("medium", architecture=architecture)
    case = draw(covariance_type, kernel.granule(Problem(5, d, covariance_type)) + 77, 5, d, device, spread=0.15)
    sizes = [len(case.rows) - 77, 77]
    weights = torch.tensor(np.random.default_rng(0).uniform(0, 3, len(case.rows)), device=device)
    weights[::5] = 0
    got, exact = (sums_of(own, case, weights=weights) for own in (kernel, TiledKernel(torch.float64)))
    for name in ("counts", "sums", "scatter", "log_likelihood", "n_rows"):
        assert relative(getattr(got, name), getattr(exact, name)) <= STATISTICS_LIMIT["medium"], name
    assert same_bits(got, sums_of(kernel, case, sizes, weights=weights))


@pytest.mark.parametrize("k", [1, 3, 63, 256, 1000, 16384, 65536])
@pytest.mark.parametrize("d", [1, 63, 130, 768, 4096])
@each_kernel
def test_shapes_fit_together(covariance_type, precision, k, d):
    problem = Problem(k, d, covariance_type)
    assert BLOCK_ROWS % granule_of(problem) == 0
    stride = stride_of(d)
    assert stride >= d
    for architecture in ("hopper", "any"):
        launches = launches_of(problem, precision, architecture)
        for tile in (launches.log_sum_exp, launches.accumulate):
            assert 128 % tile.rows == 0
            assert 128 % tile.components == 0
        assert stride % launches.step == 0
        assert stride % launches.slice == 0
        assert launches.step <= launches.slice
    kernel = TritonKernel(precision)
    small, large = (kernel.scratch_bytes(problem, rows, 1) for rows in (1000, 10**9))
    assert 0 < small <= large < (3 << 29) + TiledKernel(torch.float64).scratch_bytes(problem, granule_of(problem), 1)


@each_kernel
def test_weights(covariance_type, precision, device):
    case = draw(covariance_type, 1024 + 90, 3, 5, device, spread=1.0)
    # One far row makes its granule be redone in a wider type.
    case.rows[1050] *= 1e4
    rng = np.random.default_rng(0)
    weights = torch.tensor(rng.uniform(0, 3, len(case.rows)), device=device)
    weights[::5] = 0
    kernel, exact = TritonKernel(precision), TiledKernel(torch.float64)
    got, right = sums_of(kernel, case, weights=weights), sums_of(exact, case, weights=weights)
    for name in ("counts", "sums", "scatter", "log_likelihood", "n_rows"):
        assert relative(getattr(got, name), getattr(right, name)) <= STATISTICS_LIMIT[precision], name
    assert same_bits(got, sums_of(kernel, case, [1024, 90], weights=weights))
    # A common factor that is a power of two changes no bit but the exponent's.
    tripled = sums_of(kernel, case, weights=4 * weights)
    assert torch.equal(tripled.sums, 4 * got.sums)


@each_kernel
@pytest.mark.parametrize("d", [6, pytest.param(70, marks=pytest.mark.long)])
def test_hard_assignment(covariance_type, precision, d, device):
    case = draw(covariance_type, 1024 + 70, 70, d, device, spread=6 / d)
    case.rows[1050] *= 1e4
    kernel, exact = TritonKernel(precision, hard=True), TiledKernel(torch.float64, hard=True)
    got, right = sums_of(kernel, case), sums_of(exact, case)
    # Rows that lie between two components may go to either: at most one in a hundred here.
    assert float((got.counts - right.counts).abs().sum()) <= 20
    assert float(got.counts.sum()) == len(case.rows)
    assert relative(got.log_likelihood, right.log_likelihood) < 1e-4
    labels = kernel.top(case.rows, kernel.parameters(case.mixture, case.frame, device), 1).labels[:, 0]
    one_hot = torch.nn.functional.one_hot(labels.long(), 70).double()
    assert torch.equal(got.counts, one_hot.sum(0))
    x = case.frame.apply(case.rows, torch.float64)
    assert relative(got.sums, one_hot.T @ x) <= STATISTICS_LIMIT[precision]


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_hard_assignment_counts_no_padding(precision, device):
    # No row belongs to the first tile of components, but one of these lies where rows of padding do.
    case = draw("spherical", 2000, 70, 3, device, spread=20.0)
    m = case.mixture
    means = m.means.copy()
    means[0] = 0
    chosen = torch.tensor(means[64:], dtype=torch.float32, device=device).repeat(334, 1)[:2000]
    mixture = Mixture(m.weights, means, m.covariances, "spherical")
    case = Case(chosen, mixture, Frame(np.zeros(3), np.ones(3)))
    counts = sums_of(TritonKernel(precision, hard=True), case).counts
    assert (counts[:64] == 0).all()
    assert float(counts.sum()) == 2000


@each_kernel
@pytest.mark.parametrize("m", [1, 4])
def test_top_components(covariance_type, precision, m, device):
    case = draw(covariance_type, 1024 + 70, 4, 6, device, spread=0.5)
    case.rows[1050] *= 1e4
    m_ = case.mixture
    case = replace(case, mixture=Mixture(np.array([0.5, 0, 0.3, 0.2]), m_.means, m_.covariances, covariance_type))
    kernel, exact = TritonKernel(precision), TiledKernel(torch.float64)
    got = kernel.top(case.rows, kernel.parameters(case.mixture, case.frame, device), m)
    right = exact.top(case.rows, exact.parameters(case.mixture, case.frame, device), 4)
    assert torch.equal(got.log_likelihood, log_likelihood_of(kernel, case))
    assert (got.labels.sort(1).values.diff(dim=1) != 0).all()
    dense = torch.zeros((len(case.rows), 4), dtype=torch.float32, device=device)
    dense.scatter_(1, right.labels.long(), right.resp)
    near = 2e-2 if precision == "medium" else 1e-4
    torch.testing.assert_close(got.resp, dense.gather(1, got.labels.long()), rtol=near, atol=near)
    torch.testing.assert_close(got.resp, right.resp[:, :m], rtol=near, atol=near)
    assert (got.resp.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("covariance_type", TYPES)
def test_equal_components_rank_by_index(covariance_type, device):
    case = draw(covariance_type, 40, 130, 3, device)
    m = case.mixture
    means, covariances = np.zeros_like(m.means), m.covariances
    if covariance_type != "tied":
        covariances = np.ones_like(covariances)
    case = replace(case, mixture=Mixture(np.full(130, 1 / 130), means, covariances, covariance_type))
    kernel = TritonKernel("medium")
    got = kernel.top(case.rows, kernel.parameters(case.mixture, case.frame, device), 4)
    assert (got.labels.cpu() == torch.arange(4, dtype=torch.int32)).all()


def test_neighbours_share_tiles():
    rng = np.random.default_rng(0)
    centres = 100 * rng.standard_normal((5, 3))
    points = np.repeat(centres, 64, axis=0) + rng.standard_normal((320, 3))
    shuffled = rng.permutation(320)
    order = neighbours(points[shuffled], 64)
    assert sorted(order) == list(range(320))
    group = (shuffled[order] // 64).reshape(5, 64)
    assert (group == group[:, :1]).all()
    assert list(neighbours(np.zeros((200, 2)), 64)) == list(range(200))
    assert sorted(neighbours(rng.standard_normal((131, 2)), 64)) == list(range(131))


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("form", [HalfForm, SplitForm])
def test_scratch_of_many_components(covariance_type, form):
    """Maxima with the lists in them, and partials: no more than keeps all multiprocessors at work with K = 8192."""
    problem = Problem(65_536, 128, covariance_type)
    bounds = _bounds(problem, form, "hopper")
    granule = granule_of(problem)
    granules = bounds.rows // granule
    partials = bounds.components * _component_bytes(problem) + _moment_bytes(problem, form.moment_type)
    assert bounds.rows * _maxima_bytes(problem) + granules * partials <= 416 << 20
