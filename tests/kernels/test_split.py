"""The split products of ``high``: exact where terms are large, whatever the order of the operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgmm.frame import Frame
from streamgmm.kernels.fused.configs import COMPONENT_PADDING
from streamgmm.kernels.fused.kernel import TritonKernel
from streamgmm.kernels.fused.split_form import SplitForm
from streamgmm.kernels.fused.split_parameters import leading_planes, split_coefficients, whole_and_rest
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from tests.kernels.estep_cases import TYPES, Case, draw, errors_of, log_likelihood_of, sums_of

# The interpreter computes with NumPy, which warns of the infinities that padding is made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

KERNEL = TritonKernel("high")
GRANULE = 1024
DATA = {
    "centred, unit noise": {},
    "offset 10": {"offset": 10.0},
    "noise 0.05": {"noise": 0.05},
    "overlapping": {"spread": 0.3},
    "offset 10, noise 0.1, spread 0.1": {"offset": 10.0, "noise": 0.1, "spread": 0.1},
}

each_type = pytest.mark.parametrize("covariance_type", TYPES)


def check(case: Case, log_likelihood: float = 3e-5, statistics: float = 1e-5) -> None:
    """Mean |Δ log p| in nats, and relative errors of statistics about each component's exact mean."""
    errors = errors_of(KERNEL, case)
    assert errors.log_likelihood <= log_likelihood, errors
    assert errors.statistics <= statistics, errors


@pytest.mark.long
@each_type
@pytest.mark.parametrize("data", DATA)
def test_accuracy(covariance_type, data, device):
    check(draw(covariance_type, 2048, 256, 64, device, **{"spread": 1.0, **DATA[data]}))


@each_type
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaled_data(covariance_type, scale, device):
    check(draw(covariance_type, 512, 64, 64, device, spread=1.0, noise=0.05, scale=scale))


@pytest.mark.parametrize("covariance_type", ["diag", "tied"])
def test_features_of_many_scales(covariance_type, device):
    case = draw(covariance_type, 1024, 64, 64, device, spread=1.0, noise=0.05)
    scales = torch.logspace(-2, 2, 64, dtype=torch.float64, device=device)
    m, own = case.mixture, scales.cpu().numpy()
    square = np.outer(own, own) if covariance_type == "tied" else own**2
    mixture = Mixture(m.weights, m.means * own, m.covariances * square, covariance_type)
    frame = Frame(case.frame.shift * own, case.frame.scale / np.exp2(np.rint(np.log2(own))))
    check(Case(case.rows.double() * scales, mixture, frame))


@pytest.mark.long
@each_type
@pytest.mark.parametrize("d", [128, 768])
def test_many_features_of_little_noise(covariance_type, d, device):
    check(draw(covariance_type, 200, 64, d, device, spread=1.0, noise=0.05), 3e-5 if d == 128 else 1e-4)


@each_type
@pytest.mark.parametrize("d", [64, 130])
def test_both_orders_give_the_same_bits(covariance_type, d, device):
    """With one component l − lse is zero: r is 1 to the last bit, or the two launches differ."""
    case = draw(covariance_type, 301, 1, d, device, noise=0.05)
    assert float(sums_of(KERNEL, case).counts[0]) == len(case.rows)


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_planes_of_rows(covariance_type, device):
    case = draw(covariance_type, 45, 3, 17, device, spread=1.0)
    case.rows[3, 4] = 1e-3
    form = SplitForm(KERNEL.parameters(case.mixture, case.frame, device))
    x, norms = form.convert(case.rows, 256, torch.zeros(1, dtype=torch.int32, device=device))
    exact = case.frame.apply(case.rows, torch.float64)
    units = split_coefficients(case.mixture, case.frame, np.arange(3), device).units
    own = x[:3, :45, :17].double().sum(0) / 2.0**units.rows
    torch.testing.assert_close(own, exact, rtol=0, atol=2.0 ** (-25 - units.rows))
    assert (x[0] == x[0].round()).all()
    assert (x[:, 45:] == 0).all()
    assert (x[:, :, 17:] == 0).all()
    if covariance_type == "diag":
        squares = x[3:, :45, :17].double().sum(0) / 2.0**units.squares
        torch.testing.assert_close(squares, own**2, rtol=2.0**-32, atol=2.0 ** (-24 - units.squares))
    else:
        norms_of_rows = norms[:, :, :45].double().sum((0, 1)) / 2.0**units.products
        torch.testing.assert_close(norms_of_rows, -0.5 * (own**2).sum(1), rtol=0, atol=2.0 ** (-25 - units.products))
        assert (norms[0] == norms[0].round()).all()


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e5])
def test_rows_beyond_the_range_are_flagged(covariance_type, value, device):
    case = draw(covariance_type, 2 * GRANULE + 3, 3, 5, device)
    case.rows[GRANULE + 7, 2] = value
    flags = torch.zeros(3, dtype=torch.int32, device=device)
    form = SplitForm(KERNEL.parameters(case.mixture, case.frame, device))
    form.convert(case.rows, 2304, flags)
    assert flags.tolist() == [0, 1, 0]


@each_type
def test_a_far_row_loses_accuracy_gracefully(covariance_type, device):
    case = draw(covariance_type, 70, 16, 32, device, spread=1.0, noise=0.2)
    case.rows[11] += 9.0
    torch.testing.assert_close(
        log_likelihood_of(KERNEL, case), log_likelihood_of(TiledKernel(torch.float64), case), rtol=1e-6, atol=1e-4
    )


@each_type
def test_weight_zero_and_far_means(covariance_type, device):
    case = draw(covariance_type, 83, 4, 3, device)
    m = case.mixture
    means = m.means.copy()
    means[1] += 40.0
    case = Case(case.rows, Mixture(np.array([0.0, 0.3, 0.3, 0.4]), means, m.covariances, covariance_type), case.frame)
    torch.testing.assert_close(
        log_likelihood_of(KERNEL, case), log_likelihood_of(TiledKernel(torch.float64), case), rtol=0, atol=1e-4
    )
    counts = sums_of(KERNEL, case).counts
    assert counts[0] == 0
    assert counts[1] == 0
    assert float(counts.sum()) == pytest.approx(83, abs=1e-4)


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_coefficients_are_deterministic_and_padded(covariance_type, device):
    case = draw(covariance_type, 3, 5, 20, device)
    first, again = (split_coefficients(case.mixture, case.frame, np.arange(5), device) for _ in range(2))
    for name in ("linear", "quadratic", "energies", "factors", "constants"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.constants.shape == (COMPONENT_PADDING,)
    assert (first.constants[5:] == -float("inf")).all()
    assert (first.linear[:, 5:] == 0).all()
    assert (first.linear[:, :, 20:] == 0).all()


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_the_way_to_the_centres_and_back(covariance_type, device):
    case = draw(covariance_type, 3, 5, 20, device)
    theta = split_coefficients(case.mixture, case.frame, np.arange(5), device)
    centres = theta.centres_at(torch.arange(5, device=device), 20)
    counts = torch.rand(5, dtype=torch.float64, device=device)
    sums = torch.rand((5, 20), dtype=torch.float64, device=device)
    scatter = torch.rand_like(sums if covariance_type == "diag" else counts)
    moved = centres.sums_about_origin(counts, sums)
    torch.testing.assert_close(centres.sums_about_centres(counts, moved), sums, rtol=1e-12, atol=1e-10)
    about_origin = centres.scatter_about_origin(counts, moved, scatter)
    back = centres.scatter_about_centres(counts, moved, about_origin)
    torch.testing.assert_close(back, scatter, rtol=1e-12, atol=1e-10)


def test_planes_and_parts_restore_the_number():
    values = np.random.default_rng(0).standard_normal(1000) * 500
    planes = leading_planes(values)
    assert np.abs(planes.sum(axis=0) - values).max() <= 2.0**-13
    assert np.array_equal(planes[0], np.rint(values))
    assert np.array_equal(whole_and_rest(values).sum(axis=0), values)
