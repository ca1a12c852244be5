from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgmm.frame import Frame, frame_of
from streamgmm.kernels.reference import ReferenceKernel
from streamgmm.statistics import Statistics
from tests.oracles import COVARIANCE_TYPES, random_mixture


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_brings_data_near_unit_deviation(kind, scale):
    x = np.random.default_rng(0).normal(size=(500, 4)) * scale + 7 * scale
    frame = frame_of(x, kind)
    assert np.array_equal(np.log2(frame.scale), np.rint(np.log2(frame.scale)))
    assert np.array_equal(frame.shift.astype(np.float32), frame.shift)
    moved = frame.apply(torch.from_numpy(x), torch.float32).numpy()
    assert np.abs(moved.mean(0)).max() < 1e-3
    assert 0.6 < moved.std() < 1.6


def test_constant_features_and_spherical_scale():
    x = np.tile([5.0, 0.0, 1e-20], (10, 1))
    frame = frame_of(x, "diag")
    assert np.array_equal(frame.scale, np.ones(3))
    x[:, 0] = np.arange(10)
    assert len(set(frame_of(x, "spherical").scale)) == 1


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_restore_undoes_apply(kind):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 4)) * [1, 10, 100, 1000])
    mixture = random_mixture(kind, 3, 4)
    identity = Frame(np.zeros(4), np.ones(4))
    frame = frame_of(x.numpy(), kind)
    results = []
    for used in (identity, frame):
        statistics = Statistics.zeros(kind, 3, torch.zeros(4))
        ReferenceKernel().accumulate(x, ReferenceKernel().parameters(mixture, used, x.device), statistics)
        results.append(used.restore(statistics).recentre(torch.zeros(4)))
    for name in ("counts", "sums", "scatter", "log_likelihood"):
        torch.testing.assert_close(getattr(results[0], name), getattr(results[1], name), rtol=1e-9, atol=1e-6)
