"""Stepwise runs: the same bits however they are run, passes that do harm undone, orders that matter noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm import algorithm
from streamgmm.algorithm import course_of, rows_to_judge_order, sampled_rows
from streamgmm.checkpoint import newest
from streamgmm.errors import DataError, Interrupted, RequestError
from streamgmm.fitting import assist, fit
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.io.sources.base import Source
from streamgmm.passes import Course, region_rows, steps_of
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start
from streamgmm.state import TrainingState
from streamgmm.steps.stepwise import Schedule
from tests.kills import Killed, KilledAt
from tests.oracles import COVARIANCE_TYPES, clustered
from tests.test_distributed import Stopped, only
from tests.test_training import with_device_memory_for
from tests.worlds import run_world

ROWS = clustered(140_001, 12, 4, spread=1.5).astype(np.float32)  # three blocks, the last one short


def request(kind: str = "diag", **changes: object) -> FitRequest:
    return FitRequest(
        10, **{"covariance_type": kind, "algorithm": "stepwise", "tol": 0.0, "device": "cpu", "seed": 3, **changes}
    )


class Told(Progress):
    def __init__(self) -> None:
        self.notes, self.warnings = list[str](), list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def clusters_in_order(rows: np.ndarray = ROWS) -> np.ndarray:
    return rows[np.lexsort((np.rint(rows[:, 1] / 4), np.rint(rows[:, 0] / 4)))]


class Undisturbed(dict[str, FitResult]):
    """Results by covariance type, each made when it is first asked for."""

    def __missing__(self, kind: str) -> FitResult:
        self[kind] = fit(ArraySource(ROWS), request(kind))
        return self[kind]


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    return Undisturbed()


@pytest.fixture(scope="module")
def undisturbed_shuffled() -> FitResult:
    return fit(ArraySource(clusters_in_order()), request())


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_four_passes_of_which_three_update_within(kind, undisturbed):
    result = undisturbed[kind]
    assert [record["updates"] for record in result.history] == [50, 50, 50, 1]
    assert [record["algorithm"] for record in result.history] == ["stepwise"] * 3 + ["em"]
    assert result.n_iter == 4
    assert result.n_passes <= 5
    assert result.algorithm == "stepwise"
    assert not any(record["undone"] for record in result.history)
    full = fit(ArraySource(ROWS), request(kind, algorithm="em", max_iter=30))
    assert result.history[-1]["watched"] == pytest.approx(result.lower_bounds[-1], abs=0.05)
    assert result.lower_bounds[-1] > full.lower_bounds[-1] - 0.02


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@given(
    chunk_rows=st.one_of(st.none(), st.integers(1, 300_000)),
    threads=st.sampled_from([1, 4]),
    memory=st.sampled_from([None, 128 << 20, 256 << 20]),
)
@settings(max_examples=3, deadline=None)
def test_chunks_threads_and_memory_change_no_bit(kind, undisturbed, chunk_rows, threads, memory):
    result = fit(ArraySource(ROWS), request(kind, chunk_rows=chunk_rows, threads=threads, memory_limit=memory))
    assert result.mixture.digest == undisturbed[kind].mixture.digest
    assert result.lower_bounds == undisturbed[kind].lower_bounds


def test_compute_threads_change_no_bit(undisturbed, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert fit(ArraySource(ROWS), request("full")).mixture.digest == undisturbed["full"].mixture.digest


def test_host_memory_that_keeps_some_rows_changes_no_bit(undisturbed):
    result = fit(ArraySource(ROWS), request(host_memory=1 << 20))
    assert result.mixture.digest == undisturbed["diag"].mixture.digest


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("chunks", [0, 40, 120])
def test_killed_anywhere_resumes_to_the_same_bits(kind, chunks, undisturbed, tmp_path):
    sizes = iter([1024, 65_536, 256])
    for _ in range(3):
        often = request(kind, chunk_rows=next(sizes), checkpoint_every=0.0)
        with pytest.raises(Killed):
            fit(ArraySource(ROWS), often, tmp_path / "run", KilledAt(chunks))
    result = fit(ArraySource(ROWS), request(kind), tmp_path / "run")
    assert result.resumed == (chunks > 0)
    assert result.mixture.digest == undisturbed[kind].mixture.digest
    assert result.lower_bounds == undisturbed[kind].lower_bounds
    assert result.n_passes == undisturbed[kind].n_passes
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [record["watched"] for record in history] == [record["watched"] for record in undisturbed[kind].history]


def test_a_checkpoint_within_a_pass_is_taken_up_at_its_step(tmp_path):
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), request(checkpoint_every=0.0), tmp_path / "run", KilledAt(170))
    seen: list[tuple[int, int]] = []

    class Watching(Progress):
        def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
            seen.append((state.number, state.step))

    fit(ArraySource(ROWS), request(), tmp_path / "run", Watching())
    assert seen[0][0] == 1
    assert seen[0][1] > 0


@pytest.mark.long
def test_killed_and_resumed_in_other_processes(undisturbed, tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    program = (
        "import sys; from streamgmm.cli import main; from streamgmm import summing; "
        "add, left = summing.e_step_of_runs, [int(sys.argv.pop(1))]\n"
        "def counted(*a):\n left[0] -= 1\n if left[0] == 0: import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
        " return add(*a)\n"
        "summing.e_step_of_runs = counted; main()"
    )
    options = ["-k", "10", "--algorithm", "stepwise", "--tol", "0", "--seed", "3", "--device", "cpu"]
    command = ["fit", "x.npy", *options, "--output", "run", "--checkpoint-every", "0", "--json"]

    def run(count: int) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", program, str(count), *command]
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run(200).returncode == -9
    ended = run(-1)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout.splitlines()[-1])
    assert facts["resumed"]
    assert facts["algorithm"] == "stepwise"
    assert facts["digest"] == undisturbed["diag"].mixture.digest


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_share_every_step(size, undisturbed, tmp_path):
    def work(world):
        if world.leads:
            return fit(ArraySource(ROWS), request(chunk_rows=1024), tmp_path / "run", world=world)
        return assist(ArraySource(ROWS), request(chunk_rows=1024), world=world)

    result = run_world(size, work)[0]
    assert isinstance(result, FitResult), result
    assert result.mixture.digest == undisturbed["diag"].mixture.digest
    assert result.lower_bounds == undisturbed["diag"].lower_bounds


def test_stopped_within_a_pass_and_resumed_by_other_processes(undisturbed, tmp_path):
    def work(progress):
        def one(world):
            asked, source = request(chunk_rows=1024), ArraySource(ROWS)
            if world.leads:
                return fit(source, asked, tmp_path / "run", progress(world.rank), world=world)
            return assist(source, asked, progress(world.rank), world=world)

        return one

    for size, rank, chunks in ((3, 2, 30), (2, 0, 45)):
        outcome = run_world(size, work(only(rank, Stopped(chunks))))[0]
        assert isinstance(outcome, Interrupted), outcome
    state = newest(tmp_path / "run" / "checkpoints", torch.device("cpu"), print)[0][0]
    assert state.course.is_stepwise(state.number)
    assert state.rows_summed(len(ROWS)) > 0
    result = run_world(4, work(lambda rank: Progress()))[0]
    assert isinstance(result, FitResult), result
    assert result.mixture.digest == undisturbed["diag"].mixture.digest


def test_out_of_device_memory_takes_smaller_chunks_and_the_same_bits(undisturbed, monkeypatch):
    with_device_memory_for(4096, monkeypatch)
    progress = Told()
    result = fit(ArraySource(ROWS), request(chunk_rows=16_384), progress=progress)
    assert len(progress.warnings) == 2
    assert result.mixture.digest == undisturbed["diag"].mixture.digest


def test_the_size_of_the_sample_is_part_of_the_run_and_memory_is_not(undisturbed, tmp_path):
    asked = request(sample_rows=14_000)
    result = fit(ArraySource(ROWS), asked, tmp_path / "run")
    assert result.mixture.digest != undisturbed["diag"].mixture.digest
    bounded = fit(ArraySource(ROWS), replace(asked, memory_limit=128 << 20, chunk_rows=1024))
    assert bounded.mixture.digest == result.mixture.digest
    with pytest.raises(RequestError, match="sample_rows was 14000 and is now None"):
        fit(ArraySource(ROWS), request(), tmp_path / "run")


class Imagined(Source):
    """A source of any size that holds nothing."""

    name = "imagined"

    def __init__(self, n: int, d: int) -> None:
        self.shape, self.dtype = (n, d), np.dtype("float32")

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        raise AssertionError("nothing is read")


@pytest.mark.parametrize(
    ("n", "changes", "rows"),
    [
        (10**8, {"algorithm": "em"}, 64 * 1024),
        (10**8, {}, 1024 * 257 - 1),  # a row a parameter
        (10**8, {"algorithm": "auto"}, 1024 * 257 - 1),
        (10**6, {}, 10**5),  # a tenth of the data
        (10**8, {"covariance_type": "full"}, (256 << 20) // 512),
        (10**5, {"algorithm": "auto"}, 64 * 1024),  # too few for auto to take stepwise EM
        (10**8, {"algorithm": "auto", "n_init": 2}, 64 * 1024),
        (10**8, {"sample_rows": 5000}, 5000),
        (1000, {"sample_rows": 5000, "n_components": 8}, 1000),
        (10**8, {"n_components": 8}, 32_768),
    ],
)
def test_the_sample_is_as_large_as_growing_needs(n, changes, rows):
    asked = request(**{"covariance_type": "diag", **{k: v for k, v in changes.items() if k != "n_components"}})
    assert sampled_rows(replace(asked, n_components=changes.get("n_components", 1024)), Imagined(n, 128)) == rows


# --- orders that matter


def test_rows_in_an_order_that_matters_are_shuffled(undisturbed_shuffled):
    result = undisturbed_shuffled
    assert result.algorithm == "stepwise"
    assert "so it is shuffled" in result.why
    assert [record["shuffled"] for record in result.history] == [True] * 3 + [False]
    full = fit(ArraySource(clusters_in_order()), request(algorithm="em", max_iter=4))
    assert result.lower_bounds[-1] > full.lower_bounds[-1] - 0.01


def test_a_shuffled_run_resumes_to_the_same_bits(undisturbed_shuffled, tmp_path):
    rows = clusters_in_order()
    with pytest.raises(Killed):
        fit(ArraySource(rows), request(checkpoint_every=0.0), tmp_path / "run", KilledAt(700))
    course = newest(tmp_path / "run" / "checkpoints", torch.device("cpu"), print)[0][0].course
    assert course.shuffled
    assert course.first_window >= 128 * course.region_rows
    result = fit(ArraySource(rows), request(chunk_rows=256), tmp_path / "run")
    assert result.mixture.digest == undisturbed_shuffled.mixture.digest


class Chunked(ArraySource):
    """Rows that storage reads only many at once."""

    read_granule = 65_536


def test_where_shuffling_would_read_too_much_full_batch_em_is_used():
    progress = Told()
    result = fit(Chunked(clusters_in_order()), request(max_iter=3), progress=progress)
    assert result.algorithm == "em"
    assert result.n_iter == 3
    assert progress.notes == [result.why]
    assert "prepare --shuffle" in result.why
    same = fit(Chunked(clusters_in_order()), request(algorithm="em", max_iter=3))
    assert result.mixture.digest == same.mixture.digest


# --- harm undone


@pytest.fixture
def harmful(monkeypatch) -> ArraySource:
    """Rows sorted by cluster that pass for random ones, on which every update forgets all that came before it."""
    monkeypatch.setattr(algorithm, "design_effect", lambda *_: 0.0)
    monkeypatch.setattr(Schedule, "step_size", lambda self, seen, rows: 1.0)
    return ArraySource(clusters_in_order())


def test_a_pass_that_does_harm_is_undone(harmful):
    progress = Told()
    result = fit(harmful, request(), progress=progress)
    assert [record["undone"] for record in result.history] == [True, False, False, False]
    assert [record["updates"] for record in result.history] == [50, 1, 1, 1]
    assert [record["algorithm"] for record in result.history] == ["stepwise", "em", "em", "em"]
    assert len(progress.warnings) == 1
    assert "pass 1: undone, as the likelihood of rows kept out of the sample fell by" in progress.warnings[0]
    start = fit(harmful, request(max_iter=0)).mixture
    given = Start(start.weights, start.means, 1 / start.covariances)
    expected = fit(harmful, request(algorithm="em", max_iter=1, start=given))
    assert result.lower_bounds[1] > result.lower_bounds[0]
    assert expected.lower_bounds[0] == pytest.approx(result.lower_bounds[1], abs=1e-3)


@pytest.mark.parametrize("chunks", [100, 138])
def test_killed_around_the_pass_that_is_undone(harmful, chunks, tmp_path):
    whole = fit(harmful, request(), progress=Told())
    with pytest.raises(Killed):
        fit(harmful, request(chunk_rows=1024, checkpoint_every=0.0), tmp_path / "run", KilledAt(chunks))
    resumed = fit(harmful, request(), tmp_path / "run", Told())
    assert resumed.resumed
    assert resumed.mixture.digest == whole.mixture.digest
    assert resumed.history[0]["undone"]


# --- what comes together with it


def test_weights_count_as_repetition_does():
    rows = ROWS[:60_000]
    result = fit(ArraySource(rows), request(weights=ArraySource(np.full((60_000, 1), 3.0))))
    plain = fit(ArraySource(rows), request())
    np.testing.assert_allclose(result.lower_bounds, plain.lower_bounds, atol=0.02)
    assert result.model.n_rows == pytest.approx(180_000)


def test_held_out_rows_are_scored_and_rows_that_are_not_finite_skipped():
    rows = ROWS.copy()
    rows[::1000, 1] = np.nan
    result = fit(ArraySource(rows), request(holdout=0.1, nonfinite="skip"))
    assert result.skipped == 141
    assert result.model.held_out == pytest.approx(result.lower_bounds[-1], abs=0.1)
    with pytest.raises(DataError, match="column 1 is nan"):
        fit(ArraySource(rows), request())


def test_a_given_start_takes_the_place_of_growth():
    start = Start(means=ROWS[:10].astype(np.float64))
    result = fit(ArraySource(ROWS), request(start=start, max_iter=0))
    np.testing.assert_array_equal(result.mixture.means, ROWS[:10].astype(np.float64))
    assert fit(ArraySource(ROWS), request(start=start)).n_iter == 4


def test_full_passes_go_on_to_convergence_where_they_may(tmp_path):
    some = fit(ArraySource(ROWS), request(tol=1e-3), tmp_path / "run")
    assert not some.converged
    more = fit(ArraySource(ROWS), request(tol=1e-3, max_passes=60.0), tmp_path / "run")
    assert more.converged
    assert more.n_iter > 4
    assert more.lower_bounds[:4] == some.lower_bounds
    assert {record["algorithm"] for record in more.history[4:]} <= {"em"}


@pytest.mark.parametrize(("allowed", "stepwise"), [(5.0, 3), (4.5, 2), (3.0, 1), (2.0, 1)])
def test_few_passes_keep_one_for_the_end(allowed, stepwise):
    result = fit(ArraySource(ROWS[:60_000]), request(max_passes=allowed))
    assert result.n_passes <= allowed
    assert sum(record["algorithm"] == "stepwise" for record in result.history) == stepwise


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_components": (3, 5)}, r"n_components=\(3, 5\); give a single one"),
        ({"n_init": 2}, "n_init=2; use n_init=1"),
        ({"split_to": 20}, "split_to=20; give n_components alone"),
        ({"collapse": "drop"}, "collapse='drop'; use another policy"),
        ({"model": "kmeans", "covariance_type": "spherical"}, "use model='gmm'"),
        ({"algorithm": "fast"}, "algorithm must be one of em, stepwise, auto; got 'fast'"),
    ],
)
def test_what_cannot_be_met_is_refused_in_a_line(changes, told):
    with pytest.raises(RequestError, match=told):
        fit(ArraySource(ROWS[:1000]), replace(request(), **changes))


@pytest.mark.parametrize("chunks", [20, 400])
def test_data_that_changed_while_a_run_was_stopped_ends_it(chunks, tmp_path):
    often = request(chunk_rows=1024, checkpoint_every=0.0)
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), often, tmp_path / "run", KilledAt(chunks))
    changed = ROWS.copy()
    changed[5000, 2] += 0.5
    with pytest.raises(RequestError, match="changed"):
        fit(ArraySource(changed), often, tmp_path / "run")


def test_data_that_changed_before_the_full_pass_ends_it(tmp_path):
    often = request(chunk_rows=1024, checkpoint_every=0.0)
    course = Course(3, 3, region_rows=region_rows(len(ROWS), 256, 1024))
    chunks = sum(-(-span.rows // 1024) for n in range(3) for step in steps_of(course, len(ROWS), n) for span in step)
    with pytest.raises(Killed):
        fit(ArraySource(ROWS), often, tmp_path / "run", KilledAt(chunks + 3))
    changed = ROWS.copy()
    changed[100_000, 2] += 0.5
    with pytest.raises(RequestError, match="changed"):
        fit(ArraySource(changed), often, tmp_path / "run")


# --- auto


@pytest.mark.parametrize(
    ("rows", "changes", "chosen", "told"),
    [
        (ROWS, {}, "stepwise", "in no particular order"),
        (ROWS[:40_000], {}, "em", "40000 rows are too few"),
        (ROWS, {"n_components": 9000}, "em", "140001 rows for 80999 parameters"),
        (ROWS, {"n_init": 2}, "em", "n_init=2"),
        (clusters_in_order(), {}, "stepwise", "shuffled"),
    ],
)
def test_auto_chooses_and_says_why(rows, changes, chosen, told):
    progress, asked = Told(), replace(request(), algorithm="auto", max_iter=0, **changes)
    if asked.sizes[0] > 1000:  # its choice needs no data
        source = ArraySource(rows)
        assert len(rows_to_judge_order(asked, source)) == 0
        course = course_of(asked, source, None, None, 0)
        assert course.algorithm == chosen
        assert told in course.why
        return
    result = fit(ArraySource(rows), asked, progress=progress)
    assert result.algorithm == chosen
    assert progress.notes == [result.why]
    assert told in result.why


def test_auto_has_the_bits_of_what_it_chooses(undisturbed):
    chosen = fit(ArraySource(ROWS), request(algorithm="auto"))
    assert chosen.mixture.digest == undisturbed["diag"].mixture.digest
    few = ROWS[:30_000]
    em, auto = (fit(ArraySource(few), request(algorithm=name, max_iter=3)) for name in ("em", "auto"))
    assert em.mixture.digest == auto.mixture.digest


def test_a_run_is_tied_to_its_algorithm(tmp_path):
    few = ROWS[:3000]
    fit(ArraySource(few), request(algorithm="em", max_iter=1), tmp_path / "run")
    with pytest.raises(RequestError, match="algorithm was None and is now 'stepwise'"):
        fit(ArraySource(few), request(max_iter=1), tmp_path / "run")


def test_few_rows_make_few_steps(tmp_path: Path):
    result = fit(ArraySource(ROWS[:2000]), replace(request(), n_components=3))
    assert [record["updates"] for record in result.history] == [2, 2, 2, 1]
    tiny = fit(ArraySource(ROWS[:5]), replace(request(), n_components=2))
    assert tiny.n_iter == 4
    assert "watched" not in tiny.history[0]
