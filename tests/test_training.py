"""The loop as a whole: exact EM, and the same bits however it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm import statistics as statistics_module
from streamgmm import summing
from streamgmm.errors import DataError, NumericalError, RequestError, StreamGMMError
from streamgmm.estep import BoundMixture
from streamgmm.fitting import fit
from streamgmm.io.integrity import UNIT_ROWS, fold, unit_checksums
from streamgmm.io.ring import Ring
from streamgmm.io.sources import open_source
from streamgmm.io.sources.array import ArraySource
from streamgmm.kernels import Run
from streamgmm.mixture import Mixture, covariance_shape
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start, sample_size, uniform_rows
from streamgmm.state import TrainingState
from tests.kills import Killed, KilledAt
from tests.oracles import COVARIANCE_TYPES, clustered, em_iteration

ROWS = clustered(150_001, 5, 6, spread=1.0).astype(np.float32)  # three blocks, the last one short


def request(kind: str = "diag", **changes: object) -> FitRequest:
    return FitRequest(5, **{"covariance_type": kind, "max_iter": 4, "tol": 0.0, "device": "cpu", **changes})


@pytest.fixture(scope="module", params=[1, 2, 64], autouse=True)
def segments(request) -> Iterator[None]:
    """As many may share a chunk, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamgmm.memory._segments_at_once", lambda *_: request.param)
        yield


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, FitResult]:
    return {kind: fit(ArraySource(ROWS), request(kind)) for kind in COVARIANCE_TYPES}


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_every_iteration_is_exact_em(kind):
    x = clustered(3000, 3, 4, spread=1.5)
    started = fit(ArraySource(x), request(kind, max_iter=0, precision="highest")).mixture
    expected, bounds = started, []
    for _ in range(4):
        expected, bound = em_iteration(x, expected, 1e-6)
        bounds.append(bound)
    result = fit(ArraySource(x), request(kind, precision="highest"))
    np.testing.assert_allclose(result.lower_bounds, bounds, rtol=1e-10)
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(result.mixture, name), getattr(expected, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(
    chunk_rows=st.one_of(st.none(), st.integers(1, 300_000)),
    threads=st.sampled_from([1, 4]),
    memory=st.sampled_from([None, 64 << 20, 256 << 20]),
)
@settings(max_examples=6, deadline=None)
def test_chunks_threads_and_memory_change_no_bit(kind, undisturbed, chunk_rows, threads, memory):
    result = fit(ArraySource(ROWS), request(kind, chunk_rows=chunk_rows, threads=threads, memory_limit=memory))
    assert result.mixture.digest == undisturbed[kind].mixture.digest
    assert result.lower_bounds == undisturbed[kind].lower_bounds


@pytest.mark.parametrize("workers", [1, 3])
def test_compute_threads_change_no_bit(undisturbed, workers, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: workers)
    assert fit(ArraySource(ROWS), request()).mixture.digest == undisturbed["diag"].mixture.digest


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("chunks", [0, 2, 7])
def test_killed_at_any_chunk_resumes_to_the_same_bits(kind, chunks, undisturbed, tmp_path):
    run = tmp_path / "run"
    sizes = iter([65_536, 32_768, 131_072, 16_384])
    # Every chunk is checkpointed; each attempt is killed after some more, and the next uses other chunks.
    for _ in range(3):
        with pytest.raises(Killed):
            fit(
                ArraySource(ROWS),
                request(kind, chunk_rows=next(sizes), checkpoint_every=0.0),
                run,
                KilledAt(chunks % 3),
            )
    result = fit(ArraySource(ROWS), request(kind, checkpoint_every=0.0), run)
    assert result.mixture.digest == undisturbed[kind].mixture.digest
    assert result.lower_bounds == undisturbed[kind].lower_bounds
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in history] == [1, 2, 3, 4]
    assert [record["lower_bound"] for record in history] == list(result.lower_bounds)


def test_mid_pass_checkpoint_is_taken_up_where_it_ended(tmp_path):
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), request(chunk_rows=16_384, checkpoint_every=0.0), tmp_path / "run", KilledAt(7))
    seen: list[int] = []

    class Watching(Progress):
        def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
            seen.append(state.rows_summed(n_samples))

    fit(ArraySource(ROWS), request(chunk_rows=16_384), tmp_path / "run", Watching())
    assert seen[0] > 16_384  # not from the first row


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_order_of_rows_matters_to_rounding_only(kind, order):
    x = clustered(20_000, 3, 3)
    start = Start(means=x[:3].copy(), weights=np.full(3, 1 / 3))
    again = x[np.lexsort(x.T)] if order == "sorted" else np.random.default_rng(1).permutation(x)
    settings = {"n_components": 3, "covariance_type": kind, "max_iter": 5, "tol": 0.0, "precision": "highest"}
    ones = np.ones(covariance_shape(kind, 3, 3))
    start = Start(start.weights, start.means, ones * np.eye(3) if kind in ("full", "tied") else ones)
    one, other = (fit(ArraySource(rows), FitRequest(start=start, device="cpu", **settings)) for rows in (x, again))
    np.testing.assert_allclose(one.mixture.means, other.mixture.means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.mixture.covariances, other.mixture.covariances, rtol=1e-8, atol=1e-9)


def test_restarts_share_passes_and_the_best_is_kept():
    x = clustered(4000, 6, 2)
    source = ArraySource(x)
    alone = [
        fit(source, FitRequest(6, "diag", init="random_from_data", n_init=count, max_iter=6, tol=0.0, device="cpu"))
        for count in (1, 2, 3)
    ]
    bounds = [result.lower_bounds[-1] for result in alone]
    assert bounds == sorted(bounds)
    assert bounds[2] > bounds[0]
    assert alone[2].n_passes == alone[0].n_passes


def test_limits_on_iterations_and_passes():
    result = fit(ArraySource(ROWS), request(max_passes=3.5))
    assert result.n_iter == 3
    assert 3 < result.n_passes <= 3.5
    assert not result.converged
    converged = fit(ArraySource(ROWS), request(max_iter=100, tol=1e-2))
    assert converged.converged
    assert abs(converged.lower_bounds[-1] - converged.lower_bounds[-2]) < 1e-2


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_likelihood_never_falls(kind):
    bounds = fit(ArraySource(ROWS[:20_000]), request(kind, reg_covar=0.0, max_iter=20)).lower_bounds
    assert np.diff(bounds).min() > -1e-6


def test_a_far_outlier_that_no_sample_saw_moves_precision_on():
    x = clustered(60_000, 3, 4).astype(np.float64)
    sampled = uniform_rows(len(x), sample_size(*x.shape, 3), np.random.default_rng([0, 0]))
    x[np.setdiff1d(np.arange(len(x)), sampled)[-1]] = 1e25  # its square overflows float32
    records: list[dict[str, object]] = []

    class Watching(Progress):
        def iteration(self, record: dict[str, object]) -> None:
            records.append(record)

    result = fit(ArraySource(x), FitRequest(3, "diag", max_iter=3, device="cpu"), progress=Watching())
    assert np.isfinite(result.mixture.means).all()
    assert records[0]["precision"] == "highest"
    with pytest.raises(NumericalError, match="precision='auto'"):
        fit(ArraySource(x), FitRequest(3, "diag", max_iter=3, device="cpu", precision="high"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 77_777, 150_000])
def test_a_row_that_is_not_finite_is_named(bad, row):
    x = ROWS.copy()
    x[row, 3] = bad
    with pytest.raises(DataError, match=rf"row {row} of array: column 3 is {bad}"):
        fit(ArraySource(x), request())


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_tight_data_far_away_keeps_its_variance(kind):
    x = (1e4 + np.random.default_rng(0).normal(size=(5000, 2))).astype(np.float32)
    mixture = fit(ArraySource(x), FitRequest(1, kind, device="cpu", max_iter=3)).mixture
    variances = mixture.covariances if kind in ("diag", "spherical") else np.diagonal(mixture.covariances, 0, -2, -1)
    assert np.abs(variances - 1).max() < 0.05
    assert np.abs(variances - x.astype(np.float64).var(0).mean()).max() < 0.05


def test_auto_moves_on_when_clusters_are_tight_and_apart():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3))[rng.integers(4, size=8000)] * 100 + 1e-3 * rng.normal(size=(8000, 3))
    history = fit(ArraySource(x), FitRequest(4, "diag", device="cpu", max_iter=4, reg_covar=1e-9)).history
    assert history[-1]["precision"] == "highest"


def test_blocks_are_part_of_the_format():
    assert statistics_module.BLOCK_ROWS == 65_536
    assert statistics_module.SEGMENTS == 64


def test_config_is_json_and_names_what_the_result_depends_on(tmp_path: Path):
    fit(ArraySource(ROWS[:1000]), request(), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"n_components", "covariance_type", "seed", "tol", "fingerprint", "precision"} <= set(config)
    assert Mixture.load(tmp_path / "run").n_components == 5


@pytest.mark.parametrize("row", [0, 70_000, 150_000])
@pytest.mark.parametrize("chunks", [1, 4, 9])
def test_data_that_changed_while_a_run_was_stopped_ends_it(row, chunks, tmp_path):
    changed = ROWS.copy()
    changed[row, 2] += 0.5
    run, often = tmp_path / "run", {"chunk_rows": 16_384, "checkpoint_every": 0.0}
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), request(**often), run, KilledAt(10 + chunks))
    with pytest.raises(RequestError, match="changed"):
        fit(ArraySource(changed), request(**often), run)
    assert fit(ArraySource(ROWS), request(), run).mixture.digest == fit(ArraySource(ROWS), request()).mixture.digest


class Meddling(Progress):
    """Changes a value of a file after a number of chunks."""

    def __init__(self, path: Path, chunks: int) -> None:
        self._path, self._left = path, chunks

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        self._left -= 1
        if self._left == 0:
            rows = np.load(self._path, mmap_mode="r+")
            rows[140_000, 2] += 0.5
            rows.flush()


@pytest.mark.parametrize("recheck", [True, False])
def test_data_that_changes_between_passes_ends_the_run(recheck, tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    asked = request(chunk_rows=16_384, recheck=recheck, max_iter=5)
    meddling = Meddling(tmp_path / "x.npy", 15)  # in the second of passes of ten chunks
    if recheck:
        with pytest.raises(DataError, match=r"x.npy: changed since the first pass, between .*row 131072"):
            fit(open_source(tmp_path / "x.npy"), asked, progress=meddling)
    else:
        assert fit(open_source(tmp_path / "x.npy"), asked, progress=meddling).n_iter == 5


@pytest.mark.parametrize("chunks", [4, 13, 18, 31])
def test_rows_that_are_compared_again_are_counted_once(chunks, tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    often = request(chunk_rows=16_384, checkpoint_every=0.0)
    whole = fit(open_source(tmp_path / "x.npy"), often)
    with pytest.raises(Killed):
        fit(open_source(tmp_path / "x.npy"), often, tmp_path / "run", KilledAt(chunks))
    resumed = fit(open_source(tmp_path / "x.npy"), often, tmp_path / "run")
    assert resumed.mixture.digest == whole.mixture.digest
    assert (resumed.n_passes, resumed.bytes_read) == (whole.n_passes, whole.bytes_read)


@given(st.integers(1, 3000), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_checksums_do_not_depend_on_cuts(n, cut):
    rows = np.random.default_rng(0).integers(256, size=(n, 3), dtype=np.uint8)
    whole = fold(0, unit_checksums(rows))
    place = min(n, cut * UNIT_ROWS)
    assert fold(fold(0, unit_checksums(rows[:place])), unit_checksums(rows[place:])) == whole
    rows[n // 2, 1] ^= 1
    assert fold(0, unit_checksums(rows)) != whole


class Warned(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def with_device_memory_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on larger chunks run out of device memory, after they were half added."""
    add = summing.e_step_of_runs

    def short(chunk: torch.Tensor, bound: BoundMixture, runs: list[Run], weights: None) -> None:
        if len(chunk) <= rows:
            add(chunk, bound, runs, weights)
            return
        half = len(chunk) // 2
        add(chunk[:half], bound, [Run(0, half, runs[0].statistics)], weights)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(summing, "e_step_of_runs", short)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_out_of_device_memory_takes_smaller_chunks_and_the_same_bits(kind, undisturbed, monkeypatch, tmp_path):
    with_device_memory_for(20_000, monkeypatch)
    progress = Warned()
    result = fit(ArraySource(ROWS), request(kind, chunk_rows=65_536), tmp_path / "run", progress)
    assert result.mixture.digest == undisturbed[kind].mixture.digest
    assert result.lower_bounds == undisturbed[kind].lower_bounds
    assert [text.split(";")[0] for text in progress.warnings] == [
        f"out of device memory: going on with chunks of {rows} rows" for rows in (32_768, 16_384)
    ]
    assert result.bytes_streamed > ROWS.nbytes * 4  # what was begun again was read again


def test_out_of_device_memory_in_the_middle_of_a_resumed_segment(undisturbed, monkeypatch, tmp_path):
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), request(chunk_rows=16_384, checkpoint_every=0.0), tmp_path / "run", KilledAt(6))
    with_device_memory_for(10_000, monkeypatch)
    result = fit(ArraySource(ROWS), request(chunk_rows=16_384), tmp_path / "run", Warned())
    assert result.resumed
    assert result.mixture.digest == undisturbed["diag"].mixture.digest


def test_too_little_device_memory_for_any_chunk_is_told(monkeypatch):
    with_device_memory_for(0, monkeypatch)
    with pytest.raises(StreamGMMError, match=r"even with chunks of \d+ rows, for 5 diag components of 6 features; use"):
        fit(ArraySource(ROWS), request())
