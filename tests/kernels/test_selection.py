"""Which kernel serves a problem."""

from __future__ import annotations

import pytest
import torch

from streamgmm.errors import RequestError
from streamgmm.kernels import PRECISIONS, Kernel, Problem, available_precisions, select_kernel
from streamgmm.kernels.fused.full_kernel import FullKernel
from streamgmm.kernels.fused.full_parameters import MAX_FEATURES
from streamgmm.kernels.fused.kernel import TritonKernel
from streamgmm.kernels.tiled import TILE_BYTES, TiledKernel
from streamgmm.mixture import COVARIANCE_TYPES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_highest_is_fp64_and_a_cpu_needs_no_more_than_float32(kind, hard, device):
    problem, widest = Problem(5, 300, kind), TiledKernel(torch.float64, 3, hard, TILE_BYTES[device.type])
    assert select_kernel(problem, "highest", device, 3, hard) == widest
    for precision in ("medium", "high"):
        assert select_kernel(problem, precision, CPU, 3, hard) == TiledKernel(torch.float32, 3, hard)


@pytest.mark.parametrize("kind", ["spherical", "diag", "tied"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("precision", ["medium", "high"])
def test_fused_on_a_gpu(kind, hard, precision, monkeypatch):
    monkeypatch.setattr("streamgmm.kernels.fused.configs.architecture_of", lambda device: "hopper")
    assert select_kernel(Problem(5, 4096, kind), precision, CUDA, 1, hard) == TritonKernel(precision, hard, "hopper")


@pytest.mark.parametrize(
    ("precision", "d", "hard", "kernel"),
    [
        ("medium", 1, False, FullKernel()),
        ("medium", MAX_FEATURES, False, FullKernel()),
        ("high", MAX_FEATURES, False, TiledKernel(torch.float64, tile_bytes=TILE_BYTES["cuda"])),
        ("high", 4, True, TiledKernel(torch.float64, hard=True, tile_bytes=TILE_BYTES["cuda"])),
    ],
)
def test_full_on_a_gpu(precision: str, d: int, hard: bool, kernel: Kernel):
    assert select_kernel(Problem(5, d, "full"), precision, CUDA, 1, hard) == kernel


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("precision", ["medium", "high"])
def test_more_features_than_full_takes_name_the_limit_and_the_remedy(precision, hard):
    with pytest.raises(RequestError) as caught:
        select_kernel(Problem(5, MAX_FEATURES + 1, "full"), precision, CUDA, 1, hard)
    message = str(caught.value)
    assert f"covariance_type='full' at precision='{precision}' takes at most 256 features on a GPU; got 257" in message
    assert "use precision='highest' or 'auto', or covariance_type='diag'" in message
    assert "\n" not in message


def test_hard_assignment_of_full_names_the_remedy():
    with pytest.raises(RequestError, match=r"precision='medium' has no hard assignment .* use precision='high' or"):
        select_kernel(Problem(5, 4, "full"), "medium", CUDA, 1, hard=True)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("d", [1, MAX_FEATURES, MAX_FEATURES + 1])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_what_is_available_is_what_is_served(kind, d, device, hard, monkeypatch):
    monkeypatch.setattr("streamgmm.kernels.fused.configs.architecture_of", lambda device: "hopper")
    problem = Problem(5, d, kind)
    available = available_precisions(problem, device, hard)
    assert available[-1] == "highest"
    # From the first one on nothing is missing: `auto` may always move on to the next.
    assert available == PRECISIONS[-len(available) :]
    for precision in PRECISIONS:
        if precision in available:
            select_kernel(problem, precision, device, 1, hard)
        else:
            with pytest.raises(RequestError, match="use precision="):
                select_kernel(problem, precision, device, 1, hard)


def test_another_precision_is_refused():
    with pytest.raises(RequestError, match=f"precision must be auto, {', '.join(PRECISIONS)}; got 'low'"):
        select_kernel(Problem(1, 1, "diag"), "low", CPU)
