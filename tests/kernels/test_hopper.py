"""The log-sum-exp with products in flight: when it is chosen, and that it is `joint`'s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem
from streamgmm.kernels.fused import configs, half_form, hopper, joint
from streamgmm.kernels.fused.configs import gluon_available, overlaps_products
from streamgmm.kernels.fused.half_form import HalfForm
from streamgmm.kernels.fused.kernel import TritonKernel
from streamgmm.kernels.fused.working import WorkingRows, normalise
from streamgmm.mixture import Mixture
from tests.kernels.estep_cases import STATISTICS_LIMIT, Case, check, draw, log_likelihood_of, same_bits, sums_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("version", "interpreted", "available"),
    [("3.6.0", False, True), ("3.6.2+git1", False, True), ("3.7.0", False, False), ("3.6.0", True, False)],
)
def test_gluon_of_versions_that_were_tried(version, interpreted, available, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    assert gluon_available.__wrapped__() == available


@pytest.mark.parametrize("d", [64, 65, 128, 129, 300])
@pytest.mark.parametrize("covariance_type", ["spherical", "tied", "diag"])
@pytest.mark.parametrize("architecture", ["hopper", "any"])
@pytest.mark.parametrize("available", [True, False])
def test_rule_by_shape(covariance_type, d, architecture, available, monkeypatch):
    monkeypatch.setattr(configs, "gluon_available", lambda: available)
    expected = available and architecture == "hopper" and covariance_type != "diag" and 64 < d <= 128
    assert overlaps_products(Problem(5, d, covariance_type), architecture) == expected


class Recorder:
    """Stands in for either launch; nothing runs."""

    def __init__(self) -> None:
        self.launches: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append("joint")

    def overlapped(self, working: WorkingRows, theta: object) -> None:
        self.launches.append("hopper")


@pytest.mark.parametrize(
    ("covariance_type", "d", "architecture", "variance", "hard", "launches"),
    [
        ("spherical", 100, "hopper", 1.0, False, ["hopper"]),
        ("tied", 100, "hopper", 1.0, False, ["hopper"]),
        ("diag", 100, "hopper", 1.0, False, ["joint"]),
        ("spherical", 64, "hopper", 1.0, False, ["joint"]),
        ("spherical", 100, "any", 1.0, False, ["joint"]),
        ("spherical", 100, "hopper", 1e-6, False, ["joint"]),
        ("spherical", 100, "hopper", 1.0, True, []),
    ],
)
@pytest.mark.parametrize("maxima", [True, False])
def test_form_takes_it(covariance_type, d, architecture, variance, hard, launches, maxima, device, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(configs, "gluon_available", lambda: True)
    monkeypatch.setattr(hopper, "log_sum_exp", recorder.overlapped)
    monkeypatch.setattr(joint, "log_sum_exp", recorder)
    covariances = {"spherical": np.ones(3), "diag": np.ones((3, d)), "tied": np.eye(d)}[covariance_type]
    means = np.random.default_rng(0).standard_normal((3, d))
    mixture = Mixture(np.full(3, 1 / 3), means, variance * covariances, covariance_type)
    kernel = TritonKernel("medium", hard, architecture)
    form = HalfForm(kernel.parameters(mixture, Frame(np.zeros(d), np.ones(d)), device))
    assert form.parameters.half.scaled == (variance < 1)
    normalise(torch.zeros((2, d), device=device), form, maxima)
    assert recorder.launches == launches


def test_terms_lie_together_by_blocks(device):
    case = draw("spherical", 5, 131, 33, device)
    theta = TritonKernel("medium").parameters(case.mixture, case.frame, device).half
    blocks = theta.terms.view(2, 2, 128)
    assert torch.equal(blocks[:, 0].flatten(), theta.constants)
    assert torch.equal(blocks[:, 1].flatten(), theta.quadratic)


def both(rows: Tensor, form: HalfForm, maxima: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[WorkingRows, ...]:
    """Normalised by `hopper`, and by `joint`."""
    assert overlaps_products(form.parameters.problem, form.parameters.architecture)
    assert not form.parameters.half.scaled
    overlapped, _ = normalise(rows, form, maxima)
    with monkeypatch.context() as context:
        context.setattr(half_form, "overlaps_products", lambda *args: False)
        plain, _ = normalise(rows, form, maxima)
    return overlapped, plain


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("covariance_type", "k", "d"),
    [
        *(("spherical", k, d) for k in (1, 63, 256, 1000, 8192) for d in (65, 100, 128)),
        *(("tied", k, d) for k, d in ((63, 65), (256, 100), (8192, 128))),
    ],
)
def test_logits_have_the_bits_of_the_other_launch(covariance_type, k, d, device, monkeypatch):
    case = draw(covariance_type, 70_001, k, d, device)
    case.rows[::97] *= 30
    case.rows[-1] *= 300
    form = HalfForm(TritonKernel("medium", architecture="hopper").parameters(case.mixture, case.frame, device))
    for n in (1, 127, 1009, 70_001):
        for maxima in (True, False):
            got, plain = both(case.rows[-n:], form, maxima, monkeypatch)
            assert torch.equal(got.maxima, plain.maxima)
            assert bool(got.lse[n:].eq(torch.inf).all())
            # The peaks are the same: what differs is the logarithm of the sum, and one rounding of lse.
            change = (got.lse - plain.lse)[:n].abs()
            assert bool((change <= 1e-3 + 2.0**-23 * plain.lse[:n].abs()).all()), float(change.max())


@pytest.mark.gpu
@pytest.mark.parametrize("covariance_type", ["spherical", "tied"])
@pytest.mark.parametrize(("n", "k", "d"), [(70_001, 1000, 65), (70_001, 256, 128), (1, 3, 128), (1009, 8192, 100)])
def test_whole_step(covariance_type, n, k, d, device):
    """`check` holds the sum of the counts against N."""
    kernel, case = TritonKernel("medium", architecture="hopper"), draw(covariance_type, n, k, d, device)
    assert overlaps_products(Problem(k, d, covariance_type), "hopper")
    errors = check(kernel, case)
    if n > 2 * k:
        assert errors.statistics <= STATISTICS_LIMIT["medium"], errors


@pytest.mark.gpu
@pytest.mark.parametrize("d", [65, 128])
def test_cuts_keep_the_bits(d, device):
    case = draw("spherical", 70_001, 257, d, device, spread=0.5)
    kernel = TritonKernel("medium", architecture="hopper")
    granule = kernel.granule(Problem(257, d, "spherical"))
    whole = sums_of(kernel, case)
    assert same_bits(whole, sums_of(kernel, case, [granule, 3 * granule, 70_001 - 4 * granule]))
    apart = [log_likelihood_of(kernel, Case(rows, case.mixture, case.frame)) for rows in case.rows.split(1009)]
    assert torch.equal(log_likelihood_of(kernel, case), torch.cat(apart))


@pytest.mark.gpu
def test_no_rows(device):
    case = draw("spherical", 3, 5, 128, device)
    empty = Case(case.rows[:0], case.mixture, case.frame)
    assert log_likelihood_of(TritonKernel("medium", architecture="hopper"), empty).shape == (0,)
