from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamgmm.frame import frame_of
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.precision import (
    CHECK_ROWS,
    Deviation,
    check_sample,
    choose_precision,
    first_precision,
    next_precision,
)
from tests.oracles import COVARIANCE_TYPES, clustered, deviation_of, random_mixture


def mixture_near(x: np.ndarray, kind: str, sigma: float) -> Mixture:
    d = x.shape[1]
    covariances = {
        "full": np.broadcast_to(sigma**2 * np.eye(d), (3, d, d)),
        "tied": sigma**2 * np.eye(d),
        "diag": np.full((3, d), sigma**2),
        "spherical": np.full(3, sigma**2),
    }[kind]
    return Mixture(np.full(3, 1 / 3), x[:3], covariances, kind)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_float32_is_kept_where_it_agrees(kind):
    x = clustered(2000, 3, 8)
    rows = torch.from_numpy(x.astype(np.float32))
    assert choose_precision(random_mixture(kind, 3, 8), frame_of(x, kind), "high", rows, 1) == "high"
    measured = deviation_of(random_mixture(kind, 3, 8), frame_of(x, kind), "high", rows, 1)
    assert measured.acceptable
    assert measured.mean_absolute < 1e-4
    assert measured.statistic < 1e-5


class DoublingKernel(TiledKernel):
    """Adds up twice everything, which only ``finish`` puts right."""

    def accumulate(self, rows, parameters, statistics, weights=None):
        for _ in range(2):
            super().accumulate(rows, parameters, statistics, weights)

    def finish(self, statistics, parameters):
        names = ("counts", "sums", "scatter")
        return replace(statistics, **{name: getattr(statistics, name) / 2 for name in names})


def test_statistics_are_compared_in_the_frame_s_coordinates(monkeypatch):
    kernels = {"medium": DoublingKernel(torch.float64), "highest": TiledKernel(torch.float64)}
    monkeypatch.setattr("streamgmm.estep.select_kernel", lambda problem, precision, *_: kernels[precision])
    x = clustered(500, 3, 4)
    measured = deviation_of(random_mixture("diag", 3, 4), frame_of(x, "diag"), "medium", torch.from_numpy(x), 1)
    assert measured.statistic < 1e-12


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_float32_is_left_where_it_cancels(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4))[rng.integers(3, size=1000)] + 1e-5 * rng.normal(size=(1000, 4))
    rows = torch.from_numpy(x)
    assert choose_precision(mixture_near(x, kind, 1e-5), frame_of(x, kind), "medium", rows, 1) == "highest"


def test_not_finite_is_never_acceptable():
    assert not Deviation(float("nan"), 0.0, 0.0).acceptable
    assert not Deviation(0.0, 0.0, float("nan")).acceptable
    assert Deviation(0.0, 0.0, 0.0).acceptable


def test_order_of_precisions():
    assert [next_precision(p) for p in ("medium", "high", "highest")] == ["high", "highest", None]


def test_little_work_is_done_in_fp64_at_once():
    assert first_precision("auto") == first_precision("auto", 1e9) == "medium"
    assert first_precision("auto", 1e6) == "highest"
    assert first_precision("high", 1e6) == "high"


@pytest.mark.parametrize("n", [1, 100, CHECK_ROWS, CHECK_ROWS + 1, 10 * CHECK_ROWS - 3])
def test_checked_rows_are_spread_over_the_sample(n):
    rows = check_sample(torch.arange(n)[:, None], torch.device("cpu"))
    assert 1 <= len(rows) <= CHECK_ROWS
    assert int(rows[0]) == 0
    assert int(rows[-1]) >= n - -(-n // CHECK_ROWS)


@pytest.mark.parametrize("available", [("medium", "high", "highest"), ("high", "highest"), ("highest",)])
def test_auto_passes_over_what_is_not_available(available, monkeypatch):
    monkeypatch.setattr("streamgmm.precision.available_precisions", lambda *_: available)
    x = clustered(500, 3, 4)
    rows = torch.from_numpy(x.astype(np.float32))
    assert choose_precision(random_mixture("full", 3, 4), frame_of(x, "full"), "medium", rows, 1) == available[0]


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_hard_assignment_may_differ_where_two_components_are_as_near(kind):
    rng = np.random.default_rng(0)
    # Every row lies as near to one of the first two means as to the other, but for float32's rounding.
    x = np.concatenate([rng.normal(size=(400, 4)), 8 + rng.normal(size=(400, 4))])
    x[:400, 0] = 1e-9 * rng.normal(size=400)
    means = np.array([[-1.0, 0, 0, 0], [1, 0, 0, 0], [8, 8, 8, 8]])
    covariances = random_mixture(kind, 3, 4).covariances * 0 + {"full": np.eye(4), "tied": np.eye(4)}.get(kind, 1.0)
    mixture = Mixture(np.full(3, 1 / 3), means, covariances, kind)
    rows, frame = torch.from_numpy(x), frame_of(x, kind)
    measured = deviation_of(mixture, frame, "high", rows, 1, hard=True)
    assert measured.acceptable, measured
    assert choose_precision(mixture, frame, "medium", rows, 1, hard=True) == "medium"


def test_hard_assignment_is_checked_with_hard_kernels(monkeypatch):
    asked = []

    def select(problem, precision, device, workers, hard):
        asked.append((precision, hard))
        return TiledKernel(torch.float64, workers, hard)

    monkeypatch.setattr("streamgmm.estep.select_kernel", select)
    x = clustered(100, 3, 4)
    deviation_of(random_mixture("diag", 3, 4), frame_of(x, "diag"), "medium", torch.from_numpy(x), 1, hard=True)
    assert asked == [("medium", True), ("highest", True)]
