"""Rows that stay on a device in fp16: the bits of stored rows, in the interpreter or on a GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgmm.estep import BoundMixture, bind, e_step, e_step_of_runs, kept_form
from streamgmm.fitting import fit
from streamgmm.frame import Frame
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.kernels import Kernel, Problem, Run
from streamgmm.kernels.fused import half_form
from streamgmm.kernels.fused.kernel import TritonKernel
from streamgmm.kernels.kept import KeptRows
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start
from streamgmm.statistics import Statistics
from tests.fake_gpu import fake_gpu
from tests.kernels.estep_cases import Case, draw, same_bits
from tests.kills import Killed, KilledAt

__all__ = ["fake_gpu"]

# The interpreter computes with NumPy, which warns of the infinities that padding is made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

TYPES = ("spherical", "diag")
MEDIUM = TritonKernel("medium")


def bound_of(case: Case, kernel: Kernel = MEDIUM) -> BoundMixture:
    device = case.rows.device
    origin = torch.zeros(case.mixture.n_features, dtype=torch.float64, device=device)
    parameters = kernel.parameters(case.mixture, case.frame, device)
    return BoundMixture(kernel, parameters, case.mixture, case.frame, "medium", origin)


def kept(case: Case, bound: BoundMixture, asked: list[tuple[int, int]]) -> KeptRows:
    """The rows of a case as they are kept; notes which are wanted as stored."""
    form = kept_form([bound], case.rows.shape[1] * 8)
    place = torch.full((form.size(len(case.rows)),), 255, dtype=torch.uint8, device=case.rows.device)
    form.narrow(case.rows, place)

    def stored(first: int, last: int) -> Tensor:
        asked.append((first, last))
        return case.rows[first:last].clone()

    return form.rows(place, len(case.rows), stored)


def sums(rows: Tensor | KeptRows, bound: BoundMixture, weights: Tensor | None = None) -> Statistics:
    statistics = bound.empty_statistics()
    e_step(rows, bound, statistics, weights)
    return bound.finish(statistics)


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 3, 3), (1101, 3, 5), (2048, 2, 16), (2048 + 77, 65, 3), (97, 3, 63), (127, 5, 130), (67, 3, 300)],
)
def test_the_same_bits(covariance_type, dtype, n, k, d, device):
    case = draw(covariance_type, n, k, d, device, offset=7.0, dtype=dtype)
    bound, asked = bound_of(case), list[tuple[int, int]]()
    rows = kept(case, bound, asked)
    assert same_bits(sums(case.rows, bound), sums(rows, bound))
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    assert same_bits(sums(case.rows, bound, weights), sums(rows, bound, weights))
    assert not asked


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize(
    ("k", "granule", "reach"), [(3, 1024, 255.02), (3, 1024, 1e7), (3, 1024, math.nan), (65, 2048, 1e5)]
)
def test_rows_that_do_not_fit_are_taken_as_they_are_stored(covariance_type, k, granule, reach, device):
    # 255.02 rounds to 255, which does fit: what flags a row as it is stored must flag it as it is kept.
    case = draw(covariance_type, 2 * granule + 50, k, 4, device)
    far = reach / case.frame.scale[1] + case.frame.shift[1]
    case.rows[granule + 70, 1] = float(far)
    assert MEDIUM.granule(Problem(k, 4, covariance_type)) == granule
    bound, asked = bound_of(case), list[tuple[int, int]]()
    weights = torch.linspace(0.25, 2.0, len(case.rows), dtype=torch.float64, device=device)
    found, expected = sums(kept(case, bound, asked), bound, weights), sums(case.rows, bound, weights)
    assert asked == [(granule, 2 * granule)]
    if math.isnan(reach):
        assert found.log_likelihood.isnan()
        assert expected.log_likelihood.isnan()
    else:
        assert same_bits(found, expected)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_runs_of_one_call(covariance_type, device):
    case = draw(covariance_type, 2 * 1024 + 50, 3, 4, device)
    case.rows[1024 + 70, 1] = 1e7
    bound, asked = bound_of(case), list[tuple[int, int]]()
    rows, edges = kept(case, bound, asked), [0, 1024, len(case.rows)]
    found = bound.several_empty(2)
    e_step_of_runs(rows, bound, [Run(*edge, own) for edge, own in zip(pairwise(edges), found, strict=True)])
    assert asked == [(1024, 2048)]
    for (first, last), own in zip(pairwise(edges), found, strict=True):
        assert same_bits(bound.finish(own), sums(case.rows[first:last], bound))


@pytest.mark.parametrize("covariance_type", TYPES)
def test_rows_that_turn_out_to_lie_far(covariance_type, device):
    # All fit fp16, but for a mixture this narrow some are hundreds of deviations away.
    case = draw(covariance_type, 2 * 1024 + 300, 3, 4, device, noise=0.01, spread=1.0)
    narrow = replace(case.mixture, covariances=case.mixture.covariances * 1e-4)
    away = narrow.means[0] + 400 * np.sqrt(narrow.covariances[0])
    case.rows[:1024] = torch.from_numpy(away).to(case.rows)
    asked = list[tuple[int, int]]()
    far = bound_of(replace(case, mixture=narrow))
    rows = kept(case, bound_of(case), asked)
    assert same_bits(sums(rows, bound_of(case)), sums(case.rows, bound_of(case)))
    assert not asked
    assert same_bits(sums(rows, far), sums(case.rows, far))
    assert asked


@pytest.mark.long
@pytest.mark.parametrize("covariance_type", TYPES)
def test_bounded_scratch_and_hard_assignment(covariance_type, device, monkeypatch):
    case = draw(covariance_type, 2 * 1024 + 300, 130, 3, device)
    case.rows[2100] *= 1e5
    bound, asked = bound_of(case, TritonKernel("medium", hard=True)), list[tuple[int, int]]()
    rows, whole = kept(case, bound, asked), sums(case.rows, bound)
    assert same_bits(sums(rows, bound), whole)
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._ROW_BYTES", 1)
    monkeypatch.setattr("streamgmm.kernels.fused.kernel._PARTIAL_BYTES", 1)
    assert same_bits(sums(rows, bound), whole)


def test_which_form_a_pass_keeps(device):
    case = draw("spherical", 100, 3, 8, device)
    medium, again = bound_of(case), bound_of(draw("spherical", 100, 40, 8, device))
    again = replace(again, parameters=replace(again.parameters, frame=case.frame))
    high, exact = bound_of(case, TritonKernel("high")), bound_of(case, TiledKernel(torch.float64))
    tied = bound_of(draw("tied", 100, 3, 8, device))
    elsewhere = bound_of(replace(case, frame=Frame(case.frame.shift + 1, case.frame.scale)))
    assert kept_form([medium, again], 32).key == kept_form([medium], 64).key
    assert kept_form([medium], 16) is None  # as wide as 16 bits
    for other in (high, exact, tied, elsewhere):
        assert kept_form([medium, other], 32) is None
        assert kept_form([other, medium], 32) is None


def fitted(room: int, rows: np.ndarray, settings: dict, disguise, monkeypatch, *told: object) -> FitResult:
    """A fit whose ring believes in a GPU with so much room for chunks, and whose E-step is the interpreter's.

    ``told`` are a run's folder and its progress.
    """

    def select(problem: Problem, precision: str, device: torch.device, workers: int = 1, hard: bool = False) -> Kernel:
        return TiledKernel(torch.float64, workers, hard) if precision == "highest" else TritonKernel(precision, hard)

    monkeypatch.setattr("streamgmm.estep.select_kernel", select)
    monkeypatch.setattr("streamgmm.memory.select_kernel", lambda *own: MEDIUM)  # whose granules are small
    monkeypatch.setattr("streamgmm.job.Ring", lambda *own, **named: disguise(Ring(*own, **named), 0, room))
    rng = np.random.default_rng(1)
    means = rows[np.isfinite(rows).all(axis=1)][:3].astype(np.float64)
    precisions = 1 / rng.uniform(0.5, 1.0, means.shape)
    start = Start(None, means) if "model" in settings else Start(np.full(3, 1 / 3), means, precisions)
    usual = {"covariance_type": "diag", "max_iter": 3, "tol": 0.0, "device": "cpu", "chunk_rows": 1024, "start": start}
    return fit(ArraySource(rows), FitRequest(3, **{**usual, **settings}), *told)


def moves_on(after: int) -> Callable[..., BoundMixture]:
    """A check of precisions that leaves ``medium`` after so many mixtures."""
    seen = set()

    def checked(mixture: Mixture, frame: Frame, *own: object) -> BoundMixture:
        seen.add(mixture.digest)
        return bind(mixture, frame, "medium" if len(seen) <= after else "high", torch.device("cpu"), 1)

    return checked


# Of three passes the first finds no row on the device, nor does one that begins again in another form. More than an
# eighth is read again where one granule is far, so that its last pass does.
@pytest.mark.parametrize(
    ("case", "room", "found"),
    [
        ("some fit", 64_000, 2 / 3 * 5 / 7),  # as stored, three of seven chunks would
        ("one granule is far", 1 << 20, 1 / 3),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("all fit", 1 << 20, 2 / 3),
                ("auto moves on", 1 << 20, 1 / 3),
                ("rows are skipped", 1 << 20, 2 / 3),
                ("weights and held out", 1 << 20, 2 / 4),  # which takes another pass, as stored
                ("k-means", 1 << 20, 2 / 3),
            )
        ),
    ],
)
def test_no_bit_of_a_fit_depends_on_what_is_kept(case, room, found, fake_gpu, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("disguises a CPU")
    rows = draw("diag", 7 * 1024, 3, 4, torch.device("cpu")).rows.numpy()
    settings = {"precision": "auto" if case == "auto moves on" else "medium"}
    if case == "one granule is far":
        rows[1500] *= 1e5
        monkeypatch.setitem(half_form._LARGEST, "diag", 50.0)  # it is in the sample that scales it
    if case == "rows are skipped":
        rows[1500, 3] = np.nan
        settings["nonfinite"] = "skip"
    if case == "weights and held out":
        weights = np.random.default_rng(0).uniform(0.5, 2.0, (len(rows), 1))
        settings |= {"weights": ArraySource(weights), "holdout": 0.2}
    if case == "k-means":
        settings |= {"model": "kmeans", "covariance_type": "spherical"}
    results = []
    for own in (0, room):
        monkeypatch.setattr("streamgmm.training.bind_checked", moves_on(2))
        results.append(fitted(own, rows, settings, fake_gpu, monkeypatch))
    without, kept_rows = results
    assert without.mixture.digest == kept_rows.mixture.digest
    assert without.lower_bounds == kept_rows.lower_bounds
    assert [model.evaluation for model in without.models] == [model.evaluation for model in kept_rows.models]
    assert without.hit_rates["device"] == 0
    # What was read ahead and not used counts, too.
    assert kept_rows.hit_rates["device"] == pytest.approx(found, abs=0.08)


@pytest.mark.long
def test_memory_that_runs_out_over_kept_rows(fake_gpu, monkeypatch):
    """In the second pass, in the middle of a segment: chunks of half the rows, kept anew."""
    if torch.cuda.is_available():
        pytest.skip("disguises a CPU")
    rows, chunks = draw("diag", 7 * 1024, 3, 4, torch.device("cpu")).rows.numpy(), list[tuple[int, bool]]()
    undisturbed = fitted(0, rows, {"precision": "medium"}, fake_gpu, monkeypatch)

    def short(own: Tensor | KeptRows, *others: object) -> None:
        chunks.append((len(own), isinstance(own, KeptRows)))
        if len(own) > 1024 and sum(kept for _, kept in chunks) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        e_step_of_runs(own, *others)

    monkeypatch.setattr("streamgmm.summing.e_step_of_runs", short)
    result = fitted(1 << 20, rows, {"precision": "medium", "chunk_rows": 2048}, fake_gpu, monkeypatch)
    whole, half = [*[2048] * 3, 1024], [1024] * 7
    assert [n for n, _ in chunks] == [*whole, *whole[:2], *half, *half]
    assert [kept for _, kept in chunks] == [*[False] * 4, *[True] * 2, *[False] * 7, *[True] * 7]
    assert result.mixture.digest == undisturbed.mixture.digest
    assert result.lower_bounds == undisturbed.lower_bounds


@pytest.mark.long
def test_a_run_that_was_killed_over_kept_rows(fake_gpu, monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("disguises a CPU")
    rows = draw("diag", 7 * 1024, 3, 4, torch.device("cpu")).rows.numpy()
    rows[4000] *= 1e5
    settings = {"precision": "medium", "checkpoint_every": 0.0}
    undisturbed = fitted(0, rows, settings, fake_gpu, monkeypatch)
    with pytest.raises(Killed):
        fitted(1 << 20, rows, settings, fake_gpu, monkeypatch, tmp_path / "run", KilledAt(10))
    resumed = fitted(1 << 20, rows, settings, fake_gpu, monkeypatch, tmp_path / "run", Progress())
    assert resumed.resumed
    assert resumed.hit_rates["device"] > 0
    assert resumed.mixture.digest == undisturbed.mixture.digest
    assert resumed.lower_bounds == undisturbed.lower_bounds
