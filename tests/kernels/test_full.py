"""The Triton E-step for ``full``, on small shapes: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgmm.errors import RequestError
from streamgmm.frame import Frame, frame_of
from streamgmm.kernels import Problem
from streamgmm.kernels.fused.full_kernel import (
    FullKernel,
    _strips,
    full_granule_of,
    full_launches_of,
    live_margin,
)
from streamgmm.kernels.fused.full_parameters import MAX_FEATURES, WIDEST, screens, side_of
from streamgmm.kernels.reference import ReferenceKernel, log_joint
from streamgmm.mixture import Mixture
from streamgmm.statistics import BLOCK_ROWS, Statistics
from tests.kernels.estep_cases import (
    STATISTICS_LIMIT,
    Case,
    Errors,
    log_likelihood_of,
    relative,
    same_bits,
    sums_of,
)

# The interpreter computes with NumPy, which warns of the infinities that padding is made of.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

KERNEL = FullKernel()


def draw(
    n: int,
    k: int,
    d: int,
    device: torch.device,
    *,
    offset: float = 0.0,
    noise: float = 1.0,
    spread: float = 3.0,
    scale: float | np.ndarray = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Rows of a mixture of ellipsoids, eigenvalues ``noise``² · [0.5, 2]; everything times ``scale``, one or (D,)."""
    rng = np.random.default_rng(seed)
    scale = np.broadcast_to(scale, d)
    rotations = np.linalg.qr(rng.standard_normal((k, d, d)))[0]
    roots = noise * rotations * np.sqrt(rng.uniform(0.5, 2.0, (k, 1, d)))
    means = offset + spread * rng.standard_normal((k, d))
    weights = rng.uniform(0.5, 1.5, k)
    labels, noise_rows = rng.integers(0, k, n), rng.standard_normal((n, d))
    rows = means[labels]
    for own in np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=k))[:-1]):
        if len(own):  # a factor a row would be gigabytes
            rows[own] += noise_rows[own] @ roots[labels[own[0]]].T
    mixture = Mixture(
        weights / weights.sum(), means * scale, (roots @ roots.swapaxes(1, 2)) * np.outer(scale, scale), "full"
    )
    stored = torch.tensor(rows * scale).to(dtype).to(device)
    return Case(stored, mixture, frame_of(np.concatenate([stored.double().cpu().numpy(), means * scale]), "full"))


def errors_of(kernel: FullKernel, case: Case) -> Errors:
    """Against `WIDEST`, fp64, which its own test holds against the reference; about each component's exact mean."""
    got, exact = sums_of(kernel, case), sums_of(WIDEST, case)
    got_rows, exact_rows = log_likelihood_of(kernel, case), log_likelihood_of(WIDEST, case)
    assert got.n_rows == len(case.rows)
    assert abs(float(got.counts.sum()) - len(case.rows)) < 0.5
    torch.testing.assert_close(got.log_likelihood, got_rows.sum(), rtol=1e-12, atol=1e-9)
    means = exact.sums / exact.counts.clamp_min(1e-9)[:, None]
    sums, scatter = _about(got, means)
    exact_sums, exact_scatter = _about(exact, means)
    trace = exact_scatter.diagonal(dim1=1, dim2=2).clamp_min(0).sum(1)
    return Errors(
        log_likelihood=float((got_rows - exact_rows).abs().mean()),
        counts=relative(got.counts, exact.counts),
        # Σ r (x − mean) is zero: its scale is what Cauchy and Schwarz allow, √(Σr · Σr‖x − mean‖²).
        sums=float((sums - exact_sums).norm()) / max(float((trace * exact.counts).sum().sqrt()), 1e-30),
        scatter=relative(scatter, exact_scatter),
    )


def _about(statistics: Statistics, means: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and scatter (K, D, D) about one point a component."""
    k, d = means.shape
    scatter = means.new_zeros((k, d, d))
    i, j = torch.triu_indices(d, d, device=means.device)
    scatter[:, i, j] = scatter[:, j, i] = statistics.scatter
    cross = means[:, :, None] * statistics.sums[:, None]
    sums = statistics.sums - statistics.counts[:, None] * means
    square = means[:, :, None] * means[:, None]
    return sums, scatter - cross - cross.mT + statistics.counts[:, None, None] * square


def rounding_limit(case: Case) -> float:
    """Mean |Δ log p| in nats that rounding explains: u = 2⁻¹¹ of each x' and each entry of U, and fp32 sums.

    With y = (x' − μ')U, log p moves by (Uy)·δx' and by Σ y_j (x' − μ')_i δU_ij, and log|U| by u√D; the products
    x'U, of magnitude Σ|x'||U|, are summed in fp32 with at most D/16 truncations before b is taken off.
    """
    m, frame = case.mixture, case.frame
    x = frame.apply(case.rows, torch.float64)
    best = torch.cat([log_joint(rows, m).argmax(1) for rows in case.rows.split(1 << 15)])
    uppers = torch.tensor(m.precisions_cholesky / frame.scale[:, None]).to(x)
    centers = torch.tensor((m.means - frame.shift) * frame.scale).to(x)
    d, total = m.n_features, 0.0
    for component in best.unique():  # a factor a row would be gigabytes
        own, upper = x[best == component], uppers[component]
        gap = own - centers[component]
        y = gap @ upper
        by_rows = ((y @ upper.T) * own).norm(dim=1)
        by_factor = (gap.square() @ upper.square() * y.square()).sum(1).sqrt()
        by_sums = ((own.abs() @ upper.abs()) * y.abs()).sum(1) * (2 + d / 16) * 2.0**-23
        total += float(((by_rows + by_factor) * 2.0**-11 + by_sums).sum())
    return total / len(x) + d**0.5 * 2.0**-11 + 1e-5


def check(case: Case, kernel: FullKernel = KERNEL) -> None:
    errors = errors_of(kernel, case)
    assert errors.log_likelihood <= rounding_limit(case), errors
    # A single row's own rounding is its whole error about its mean.
    if len(case.rows) > 2 * case.mixture.n_components:
        assert errors.statistics <= STATISTICS_LIMIT["medium"], errors


@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (1, 3, 3),
        (1, 1, 1),
        (67, 1, 17),
        (211, 3, 1),
        (211, 3, 63),
        (211, 63, 3),
        (131, 3, 64),
        (67, 3, 130),
        (65, 2, 256),
        # Bounds come first.
        (131, 17, 65),
        (83, 17, 130),
        (67, 16, 256),
    ],
)
def test_against_fp64(n, k, d, device):
    check(draw(n, k, d, device))


@pytest.mark.parametrize(("k", "d"), [(11, 3), (11, 17), (11, 64), (11, 128), (11, 130), (17, 128)])
def test_tiles_of_another_architecture(k, d, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("a GPU runs its own tiles")
    monkeypatch.setattr("streamgmm.kernels.fused.full_kernel.architecture_of", lambda device: "hopper")
    check(draw(131, k, d, device))


def test_agrees_with_the_textbook(device):
    case = draw(53, 4, 7, device)
    got, exact = sums_of(KERNEL, case), sums_of(ReferenceKernel(), case)
    for name in ("counts", "sums", "scatter"):
        assert relative(getattr(got, name), getattr(exact, name)) <= STATISTICS_LIMIT["medium"]


@pytest.mark.parametrize(("offset", "scale"), [(10.0, 1.0), (100.0, 1.0), (1e4, 1.0), (10.0, 1e-3), (1e4, 1e3)])
def test_offset_and_scale(offset, scale, device):
    check(draw(131, 5, 6, device, offset=offset, scale=scale))


def test_scales_that_differ_between_features(device):
    check(draw(131, 3, 5, device, offset=2.0, scale=10.0 ** np.linspace(-2, 2, 5)))


def test_tight_components_far_from_the_frame_keep_their_scatter(device):
    # Rows that fp16 holds exactly, so that only the sums are in question: (‖μ‖/σ)² is 3·10⁵.
    rng = np.random.default_rng(1)
    means = np.array([[16.0, -8.0], [-16.0, 8.0]])
    rows = means[rng.integers(0, 2, 900)] + rng.integers(-3, 4, (900, 2)) / 64
    mixture = Mixture(np.array([0.5, 0.5]), means, np.stack([np.eye(2) * 1e-3] * 2), "full")
    case = Case(torch.tensor(rows, device=device), mixture, Frame(np.zeros(2), np.ones(2)))
    assert errors_of(KERNEL, case).statistics < 1e-6


def test_cuts_at_granules_keep_the_bits(device, monkeypatch):
    case = draw(2 * 1024 + 77, 3, 5, device)
    # One far row makes its granule be redone in fp64, which must not depend on the cut either.
    case.rows[1500] *= 1e4
    assert KERNEL.granule(Problem(3, 5, "full")) == 1024
    whole, rows = sums_of(KERNEL, case), log_likelihood_of(KERNEL, case)
    assert same_bits(whole, sums_of(KERNEL, case, [1024, 1024 + 77]))
    # A bounded scratch cuts the rows too, and the components.
    monkeypatch.setattr("streamgmm.kernels.fused.full_kernel._ROW_BYTES", 1)
    monkeypatch.setattr("streamgmm.kernels.fused.full_kernel._PARTIAL_BYTES", 1)
    assert same_bits(whole, sums_of(KERNEL, case))
    assert torch.equal(rows, log_likelihood_of(KERNEL, case))


def test_cuts_keep_the_bits_of_screened_rows(device, monkeypatch):
    # The first granule is separated, rows of the second lie between all components.
    case = draw(1024 + 77, 16, 70, device)
    case.rows[1024:] = case.rows[1024:] * 0.02 + torch.as_tensor(case.mixture.means.mean(0), device=device)
    assert KERNEL.granule(Problem(16, 70, "full")) == 1024
    whole, rows = sums_of(KERNEL, case), log_likelihood_of(KERNEL, case)
    assert same_bits(whole, sums_of(KERNEL, case, [1024, 77]))
    monkeypatch.setattr("streamgmm.kernels.fused.full_kernel._ROW_BYTES", 1)
    monkeypatch.setattr("streamgmm.kernels.fused.full_kernel._PARTIAL_BYTES", 1)
    assert same_bits(whole, sums_of(KERNEL, case))
    assert torch.equal(rows, log_likelihood_of(KERNEL, case))


def strip_of(case: Case, *, screened: bool) -> tuple[Tensor, Tensor]:
    """The first strip's (K, n) logits or bounds, and its rows' lse, in bits."""
    parameters = KERNEL.parameters(case.mixture, case.frame, case.rows.device)
    strip = next(_strips(case.rows, parameters, screened))
    n, k = len(strip.rows), case.mixture.n_components
    logits = strip.buffers.logits[: k * strip.pitch].reshape(k, strip.pitch)[:, :n]
    return logits, strip.buffers.peaks[:n] + strip.buffers.log_totals[:n]


def check_screening(case: Case) -> Tensor:
    """Which pairs (K, n) were left at their bound, after showing that none of them was needed."""
    problem = Problem(case.mixture.n_components, case.mixture.n_features, "full")
    assert screens(problem)
    (got, lse), (exact, exact_lse) = strip_of(case, screened=True), strip_of(case, screened=False)
    bounded = got - exact > 1e-2
    torch.testing.assert_close(got[~bounded], exact[~bounded], atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(lse, exact_lse, atol=1e-3, rtol=1e-5)
    assert (got - lse < -live_margin(problem))[bounded].all()
    return bounded


@pytest.mark.parametrize("dense_above", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_bounds_leave_what_matters(spread, dense_above, device, monkeypatch):
    monkeypatch.setattr("streamgmm.kernels.fused.full_kernel._DENSE_ABOVE", dense_above)
    case = draw(131, 20, 100, device, spread=spread)
    bounded = check_screening(case)
    # Everything overlaps, or is completed since the limit is none.
    everything = spread < 1 or dense_above == 0
    assert float(bounded.float().mean()) == 0 if everything else float(bounded.float().mean()) > 0.9
    if spread == 1:
        check(case)


def test_a_component_of_most_rows_completes_them_all(device):
    case = draw(300, 16, 80, device)
    rows = case.rows[:1].repeat(200, 1) + 0.1 * torch.randn((200, 80), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    # 800 of the granule's 1,024 rows: more than a list holds.
    check_screening(replace(case, rows=torch.cat([case.rows, *[rows] * 4])))


def test_the_largest_bound_need_not_be_the_largest_logit(device):
    # Pairs of components that only the last, least telling feature tells apart; the heavier of a pair is never drawn.
    rng = np.random.default_rng(0)
    k, d, n = 16, 70, 150
    places = rng.permuted(np.tile(np.linspace(-4.5, 4.5, k // 2)[:, None], d), axis=0)
    means = np.repeat(places, 2, axis=0)
    means[:, -1] = np.arange(k) % 2 * 10.0
    weights = np.where(np.arange(k) % 2, 0.9, 0.1) * 2 / k
    covariances = np.stack([np.eye(d)] * k)
    covariances[:, -1, -1] = 4.0
    labels = rng.integers(0, k // 2, n) * 2
    scales = np.append(np.ones(d - 1), 0.5)
    rows = torch.tensor(means[labels] + scales * rng.standard_normal((n, d)), dtype=torch.float32, device=device)
    mixture = Mixture(weights, means, covariances, "full")
    case = Case(rows, mixture, frame_of(np.concatenate([rows.double().cpu().numpy(), means]), "full"))
    parameters = KERNEL.parameters(mixture, case.frame, device)
    assert int(parameters.factors.order[d - 1]) == d - 1
    assert KERNEL.top(rows, parameters, 1).labels[:, 0].tolist() == labels.tolist()
    assert check_screening(case).float().mean() > 0.8
    check(case)
    counts = sums_of(KERNEL, case).counts.cpu()
    assert float(counts[1::2].sum()) < 0.1 * n


def test_features_that_tell_components_apart_come_first(device):
    case = draw(80, 16, 70, device, scale=10.0 ** np.linspace(-2, 2, 70))
    means = case.mixture.means.copy()
    means[:, :6] = means[0, :6]
    mixture = Mixture(case.mixture.weights, means, case.mixture.covariances, "full")
    order = KERNEL.parameters(mixture, case.frame, device).factors.order.cpu()
    assert sorted(order[64:70].tolist()) == list(range(6))
    assert order[70:].tolist() == list(range(70, 128))


def test_nothing_outside_is_read_or_written(device):
    n, k, d = 67, 3, 5
    case = draw(n, k, d, device)
    exact = sums_of(KERNEL, case)
    rows = torch.full((n + 64, d), float("nan"), device=device)
    rows[32 : 32 + n] = case.rows
    fields = {}
    for name in ("counts", "sums", "scatter"):
        shape = getattr(exact, name).shape
        guarded = torch.full((shape[0] + 20, *shape[1:]), 7.0, dtype=torch.float64, device=device)
        guarded[10:-10] = 0
        fields[name] = guarded
    statistics = replace(
        Statistics.zeros("full", k, torch.zeros(d, dtype=torch.float64, device=device), device),
        **{name: guarded[10:-10] for name, guarded in fields.items()},
    )
    KERNEL.accumulate(rows[32 : 32 + n], KERNEL.parameters(case.mixture, case.frame, device), statistics)
    assert same_bits(exact, statistics)
    for guarded in fields.values():
        assert (guarded[:10] == 7).all()
        assert (guarded[-10:] == 7).all()


def test_a_weight_of_zero(device):
    case = draw(83, 4, 3, device)
    m = case.mixture
    case = replace(case, mixture=Mixture(np.array([0.0, 0.5, 0.0, 0.5]), m.means, m.covariances, "full"))
    statistics = sums_of(KERNEL, case)
    for name in ("counts", "sums", "scatter"):
        assert (getattr(statistics, name)[[0, 2]] == 0).all()
    check(case)


@pytest.mark.parametrize(("k", "d"), [(3, 5), (16, 66)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite(value, k, d, device):
    case = draw(70, k, d, device)
    case.rows[41, 2] = value
    rows = log_likelihood_of(KERNEL, case)
    assert not rows[41].isfinite()
    assert rows.isfinite().sum() == 69
    assert not sums_of(KERNEL, case).log_likelihood.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.uint8], ids=str)
def test_stored_types(dtype, device):
    offset = {torch.uint8: 128.0, torch.float64: 1e6}.get(dtype, 0.0)
    check(draw(90, 3, 5, device, offset=offset, spread=20.0, noise=5.0, dtype=dtype))


@pytest.mark.parametrize("far", [1500.0, 4e4])
def test_far_rows_are_redone_one_granule_at_a_time(far, device):
    case = draw(2 * 1024 + 50, 3, 4, device)
    before = log_likelihood_of(KERNEL, case)
    case.rows[1100] = far
    after = log_likelihood_of(KERNEL, case)
    assert torch.equal(before[:1024], after[:1024])
    assert torch.equal(before[2048:], after[2048:])
    assert relative(after[1100], log_likelihood_of(ReferenceKernel(), case)[1100]) < 1e-6
    assert errors_of(KERNEL, case).statistics <= STATISTICS_LIMIT["medium"]


def test_precisions_beyond_fp16(device):
    # Rows that fp16 holds exactly, so that the range of 1/σ² = 2³⁶ is in question, not the rounding of x'.
    rng = np.random.default_rng(3)
    k, d = 4, 3
    means = rng.integers(-8, 9, (k, d)) / 2**14
    rows = means[rng.integers(0, k, 200)] + rng.integers(-2, 3, (200, d)) / 2**18
    mixture = Mixture(np.full(k, 1 / k), means, np.stack([np.eye(d) * 2.0**-36] * k), "full")
    case = Case(torch.tensor(rows, device=device), mixture, Frame(np.zeros(d), np.ones(d)))
    assert errors_of(KERNEL, case).statistics < 1e-4


def test_small_responsibilities_add_up(device):
    # Two components in one place: every row gives the second 1e-7.
    n, d = 1500, 2
    rows = torch.randn((n, d), generator=torch.Generator().manual_seed(0)).to(device)
    mixture = Mixture(np.array([1 - 1e-7, 1e-7]), np.zeros((2, d)), np.stack([np.eye(d)] * 2), "full")
    case = Case(rows, mixture, Frame(np.zeros(d), np.ones(d)))
    got, exact = sums_of(KERNEL, case), sums_of(WIDEST, case)
    assert float(got.counts[1]) == pytest.approx(n * 1e-7, rel=1e-5)
    assert relative(got.scatter[1], exact.scatter[1]) < 1e-3


def test_what_is_dropped_is_within_its_bound(device):
    # 63 components of responsibility 2⁻³¹, less than 2⁻²⁴/K each.
    k, n = 64, 300
    weights = np.full(k, 2.0**-31)
    weights[0] = 1 - weights[1:].sum()
    mixture = Mixture(weights, np.zeros((k, 1)), np.ones((k, 1, 1)), "full")
    rows = torch.randn((n, 1), generator=torch.Generator().manual_seed(0)).to(device)
    counts = sums_of(KERNEL, Case(rows, mixture, Frame(np.zeros(1), np.ones(1)))).counts
    assert (counts[1:] == 0).all()
    assert abs(float(counts.sum()) - n) <= n * 2.0**-23


def test_overlapping_components_share_each_row(device):
    case = draw(400, 40, 3, device, spread=0.1)
    check(case)
    assert abs(float(sums_of(KERNEL, case).counts.sum()) - 400) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_weights_repeat_rows(dtype, device):
    case = draw(300, 5, 4, device, spread=1.0)
    times = torch.arange(300, device=device) % 4
    parameters = KERNEL.parameters(case.mixture, case.frame, device)
    weighted = _zeros(case)
    KERNEL.accumulate(case.rows, parameters, weighted, times.to(dtype))
    repeated = sums_of(KERNEL, replace(case, rows=case.rows.repeat_interleave(times, dim=0)))
    assert float(weighted.n_rows) == float(repeated.n_rows)
    for name in ("counts", "sums", "scatter", "log_likelihood"):
        assert relative(getattr(weighted, name), getattr(repeated, name)) < 1e-3, name
    assert relative(weighted.counts, repeated.counts) < 1e-6


def test_weights_keep_the_bits_over_cuts_and_reach_far_granules(device):
    case = draw(2 * 1024 + 77, 3, 5, device)
    case.rows[1500] *= 1e4
    weights = torch.rand(len(case.rows), generator=torch.Generator().manual_seed(0)).double().to(device)
    weights[10:20] = 0
    parameters = KERNEL.parameters(case.mixture, case.frame, device)
    whole, pieces = _zeros(case), _zeros(case)
    KERNEL.accumulate(case.rows, parameters, whole, weights)
    for rows, own in zip(case.rows.split(1024), weights.split(1024), strict=True):
        KERNEL.accumulate(rows, parameters, pieces, own)
    assert same_bits(whole, pieces)
    assert torch.equal(whole.n_rows, pieces.n_rows)
    assert float(whole.n_rows) == pytest.approx(float(weights.sum()), rel=1e-12)
    exact = _zeros(case)
    WIDEST.accumulate(case.rows, parameters.double, exact, weights)
    for name in ("counts", "scatter", "log_likelihood"):
        assert relative(getattr(whole, name), getattr(exact, name)) < 1e-3, name


def _zeros(case: Case) -> Statistics:
    shift = torch.zeros(case.mixture.n_features, dtype=torch.float64, device=case.rows.device)
    return Statistics.zeros("full", case.mixture.n_components, shift, case.rows.device)


@pytest.mark.parametrize("m", [1, 3, 7])
def test_top_components(m, device):
    case = draw(211, 7, 4, device, spread=1.0)
    parameters = KERNEL.parameters(case.mixture, case.frame, device)
    top = KERNEL.top(case.rows, parameters, m)
    exact = log_joint(case.rows.cpu(), case.mixture).softmax(1)
    order = exact.argsort(dim=1, descending=True, stable=True)[:, :m]
    torch.testing.assert_close(top.resp.cpu().double(), exact.gather(1, order), atol=5e-3, rtol=0)
    torch.testing.assert_close(exact.gather(1, top.labels.cpu().long()), exact.gather(1, order), atol=5e-3, rtol=0)
    assert all(len(set(labels)) == m for labels in top.labels.tolist())
    torch.testing.assert_close(top.log_likelihood, log_likelihood_of(KERNEL, case), rtol=0, atol=0)
    assert (top.labels.dtype, top.resp.dtype) == (torch.int32, torch.float32)


def test_ties_go_to_the_lower_index(device):
    d = 3
    mixture = Mixture(np.array([0.25, 0.25, 0.0, 0.25, 0.25]), np.zeros((5, d)), np.stack([np.eye(d)] * 5), "full")
    case = Case(torch.ones((40, d), device=device), mixture, Frame(np.zeros(d), np.ones(d)))
    top = KERNEL.top(case.rows, KERNEL.parameters(mixture, case.frame, device), 5)
    assert (top.labels.cpu() == torch.tensor([0, 1, 3, 4, 2])).all()
    torch.testing.assert_close(top.resp.cpu()[0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))


def test_top_takes_far_granules_in_fp64(device):
    case = draw(1024 + 50, 3, 4, device)
    case.rows[1030] = 4e4
    top = KERNEL.top(case.rows, KERNEL.parameters(case.mixture, case.frame, device), 2)
    exact = log_joint(case.rows[1030:1031].cpu(), case.mixture)
    assert top.labels[1030].tolist() == exact[0].argsort(descending=True)[:2].tolist()
    torch.testing.assert_close(top.log_likelihood, log_likelihood_of(KERNEL, case), rtol=0, atol=0)


def test_repeats_keep_the_bits(device):
    case = draw(300, 9, 20, device, spread=0.3)
    assert same_bits(sums_of(KERNEL, case), sums_of(KERNEL, case))


def test_the_limit_on_features_is_named(device):
    d = MAX_FEATURES + 1
    mixture = Mixture(np.ones(1), np.zeros((1, d)), np.eye(d)[None], "full")
    with pytest.raises(RequestError, match=r"at most 256 features on a GPU; got 257; use precision='highest'"):
        KERNEL.parameters(mixture, Frame(np.zeros(d), np.ones(d)), device)


def test_a_covariance_that_is_not_positive_definite_is_named(device):
    mixture = Mixture(np.ones(1), np.zeros((1, 2)), np.array([[[1.0, 2.0], [2.0, 1.0]]]), "full")
    with pytest.raises(RequestError, match="raise reg_covar"):
        KERNEL.parameters(mixture, Frame(np.zeros(2), np.ones(2)), device).factors  # noqa: B018


@pytest.mark.parametrize("k", [1, 3, 63, 256, 1000, 16384, 65536])
@pytest.mark.parametrize("d", [1, 17, 63, 130, 256])
def test_shapes_fit_together(k, d):
    problem = Problem(k, d, "full")
    granule = full_granule_of(problem)
    assert BLOCK_ROWS % granule == 0
    for architecture in ("hopper", "any"):
        launches = full_launches_of(problem, architecture)
        assert granule % launches.log_joint.rows == 0
        assert launches.log_joint.width * side_of(problem) in (64, 128)
    small, large = (KERNEL.scratch_bytes(problem, rows, 1) for rows in (1000, 10**9))
    assert 0 < small <= large


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "d"), [(99_991, 1000, 128), (100_003, 63, 130), (99_991, 3, 256), (40_009, 4099, 17), (200_003, 1, 1)]
)
def test_against_fp64_at_sizes_only_a_gpu_reaches(n, k, d, device):
    check(draw(n, k, d, device))


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [3.0, 0.1])
def test_repeats_and_cuts_keep_the_bits_at_size(spread, device):
    case = draw(99_991, 257, 96, device, spread=spread)
    case.rows[50_001] *= 3000
    granule = KERNEL.granule(Problem(257, 96, "full"))
    whole = sums_of(KERNEL, case)
    for _ in range(3):
        assert same_bits(whole, sums_of(KERNEL, case))
    assert same_bits(whole, sums_of(KERNEL, case, [granule, 2 * granule, 99_991 - 3 * granule]))
