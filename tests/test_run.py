"""The RUN folder: one process, one set of settings, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamgmm.errors import DamagedFileError, DataError, Interrupted, RequestError, RunError
from streamgmm.fitting import fit
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.mixture import load_model
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.run import RunFolder
from streamgmm.seeding import Start
from streamgmm.state import TrainingState
from tests.oracles import clustered

ROWS = clustered(3000, 3, 4, spread=1.0).astype(np.float32)
IDENTITY: dict[str, object] = {"fingerprint": "abc", "n_components": 3, "max_iter": 5, "tol": float("inf")}


def request(**changes: object) -> FitRequest:
    settings = {"covariance_type": "diag", "tol": 0.0, "max_iter": 3, "init": "random_from_data", "device": "cpu"}
    return FitRequest(**{"n_components": 3, **settings, **changes})


def run(folder: Path, rows: np.ndarray = ROWS, *, fresh: bool = False, **changes: object) -> FitResult:
    return fit(ArraySource(rows), request(**changes), folder, fresh=fresh)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def history(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


class StopAt(Progress):
    """Asks for a stop at an iteration."""

    def __init__(self, iteration: int) -> None:
        self._at = iteration
        self._stop = False

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        self._stop = state.n_iter == self._at

    def stop_requested(self) -> int | None:
        return 15 if self._stop else None


def test_a_finished_run_leaves_the_documented_files(tmp_path):
    result = run(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "history.jsonl",
        "model.safetensors",
    }
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    mixture, metadata = load_model(tmp_path / "run")
    assert mixture.digest == result.mixture.digest
    assert metadata["result"]["n_iter"] == 3
    assert [record["iteration"] for record in history(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["n_components"] == 3


def test_a_finished_run_is_returned_as_it_was(tmp_path):
    first = run(tmp_path / "run")
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = run(tmp_path / "run")
    assert not first.resumed
    assert again.resumed
    assert again.plan is None
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    without = {"resumed"}
    assert {k: v for k, v in again.summary().items() if k not in without} == {
        k: v for k, v in first.summary().items() if k not in without
    }


@pytest.mark.parametrize("stops", [(2,), (1, 2, 4), (0, 5)])
@pytest.mark.parametrize("n_init", [1, 3])
def test_more_iterations_continue_to_the_undisturbed_result(tmp_path, stops, n_init):
    straight = fit(ArraySource(ROWS), request(max_iter=6, n_init=n_init, tol=1e-3))
    for max_iter in (*stops, 6):
        result = run(tmp_path / "run", max_iter=max_iter, n_init=n_init, tol=1e-3)
    assert result.mixture.digest == straight.mixture.digest
    assert result.lower_bounds == straight.lower_bounds
    assert result.n_passes == straight.n_passes
    assert load_model(tmp_path / "run")[0].digest == straight.mixture.digest


def test_other_starts_go_on_after_the_best_converged(tmp_path):
    rows = np.random.default_rng(3)
    x = rows.normal(size=(2000, 2)) + rows.integers(0, 6, (2000, 1)) * rows.normal(size=2) * 2
    settings: dict[str, object] = {"n_components": 5, "n_init": 4, "seed": 3, "tol": 1e-3}
    straight = fit(ArraySource(x), request(max_iter=60, **settings))
    for max_iter in (3, 6, 60):
        result = run(tmp_path / "run", x, max_iter=max_iter, **settings)
    assert result.mixture.digest == straight.mixture.digest


def test_a_smaller_max_iter_than_was_run_is_refused(tmp_path):
    run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"has run 3 iterations already, more than max_iter=2; ask for 3 or more"):
        run(tmp_path / "run", max_iter=2)
    del before["config.json"]
    assert before.items() <= contents(tmp_path / "run").items()


def test_a_stop_is_saved_and_resumed(tmp_path):
    straight = fit(ArraySource(ROWS), request(max_iter=5))
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        fit(ArraySource(ROWS), request(max_iter=5), tmp_path / "run", StopAt(2))
    assert caught.value.exit_status == 128 + 15
    assert not (tmp_path / "run" / "model.safetensors").exists()
    result = run(tmp_path / "run", max_iter=5)
    assert result.resumed
    assert result.mixture.digest == straight.mixture.digest
    assert [record["iteration"] for record in history(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_lines_of_history_that_no_checkpoint_saw_are_taken_back(tmp_path):
    with pytest.raises(Interrupted):
        fit(ArraySource(ROWS), request(max_iter=5), tmp_path / "run", StopAt(2))
    with (tmp_path / "run" / "history.jsonl").open("a") as file:
        file.write('{"iteration": 3}\n{"iter')
    run(tmp_path / "run", max_iter=5)
    assert [record["iteration"] for record in history(tmp_path / "run")] == [1, 2, 3, 4, 5]


OTHER_SETTINGS = {
    "n_components": 4,
    "covariance_type": "full",
    "tol": 1e-2,
    "reg_covar": 1e-3,
    "n_init": 2,
    "init": "kmeans",
    "seed": 1,
    "precision": "highest",
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_and_change_nothing(tmp_path, name):
    run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError) as caught:
        run(tmp_path / "run", **{name: OTHER_SETTINGS[name]})
    assert f"{name} was {getattr(request(), name)!r} and is now {OTHER_SETTINGS[name]!r}" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_other_starting_means_are_refused_in_a_short_line(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(RunError, match="the given starting parameters changed") as caught:
        run(tmp_path / "run", start=Start(means=ROWS[:3].astype(np.float64)))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("rows", [ROWS + 1, ROWS[:-1], ROWS.astype(np.float64), np.hstack([ROWS, ROWS])])
def test_other_data_is_refused(tmp_path, rows):
    run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="made differently"):
        run(tmp_path / "run", rows)
    assert contents(tmp_path / "run") == before


def test_what_changes_no_bit_may_change_between_calls(tmp_path):
    straight = fit(ArraySource(ROWS), request(max_iter=4))
    run(tmp_path / "run", max_iter=2)
    result = run(tmp_path / "run", max_iter=4, chunk_rows=4096, threads=1, memory_limit=1 << 30, checkpoint_every=0.0)
    assert result.mixture.digest == straight.mixture.digest


def test_a_call_that_saved_nothing_does_not_tie_the_folder(tmp_path):
    bad = ROWS.copy()
    bad[77, 1] = np.nan
    with pytest.raises(DataError, match="row 77"):
        run(tmp_path / "run", bad)
    assert run(tmp_path / "run", seed=1).n_iter == 3


def test_fresh_moves_the_run_aside(tmp_path):
    results = [run(tmp_path / "run", seed=seed, fresh=True) for seed in range(3)]
    kept = {path.name: load_model(path)[0].digest for path in tmp_path.iterdir()}
    digests = [result.mixture.digest for result in results]
    assert kept == {"run.1": digests[0], "run.2": digests[1], "run": digests[2]}
    assert not any(result.resumed for result in results)


def test_fresh_in_the_current_folder(tmp_path, monkeypatch):
    run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    run(Path(), seed=1, fresh=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1"}


def test_a_second_holder_is_refused_until_the_first_ends(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.begin(IDENTITY)
    before = contents(tmp_path)
    for fresh in (False, True):
        with pytest.raises(RunError, match=r"run: another process is working in it"):
            RunFolder(tmp_path / "run", fresh=fresh)
    assert contents(tmp_path) == before
    first.close()
    RunFolder(tmp_path / "run").close()


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_refused_until_the_first_is_killed(tmp_path):
    run(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process"):
            run(tmp_path / "run")
        holder.kill()
        holder.wait(timeout=30)
    assert run(tmp_path / "run").resumed


def test_what_is_not_a_run_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": []}')
    (folder / "model.safetensors").write_text("somebody's")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for path in (folder, tmp_path / "file", Path("/dev/null"), Path("/proc"), tmp_path):
        for fresh in (False, True):
            with pytest.raises(RunError, match="exists and is not a streamgmm run") as caught:
                run(path, fresh=fresh)
            assert str(path) in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "file/run", "a" * 300])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot be used for a run"):
        run(tmp_path / place)
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_empty_folder_and_missing_parents_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")
    run(tmp_path / "a" / "b" / "c")
    assert load_model(tmp_path / "empty")[0].digest == load_model(tmp_path / "a" / "b" / "c")[0].digest


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\0", "[" * 100_000])
def test_damaged_settings_are_told_and_nothing_is_overwritten(tmp_path, text):
    run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    before = contents(tmp_path / "run")
    with pytest.raises(DamagedFileError, match=r"run/config\.json: .*--fresh"):
        run(tmp_path / "run", max_iter=5)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("finished", [False, True])
def test_lost_settings_do_not_pass_for_any_settings(tmp_path, finished):
    run(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    if not finished:
        (tmp_path / "run" / "model.safetensors").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"config\.json: is missing"):
        run(tmp_path / "run", n_components=2)
    assert contents(tmp_path / "run") == before


def test_checkpoints_of_another_run_are_refused(tmp_path):
    run(tmp_path / "run", max_iter=2)
    with pytest.raises(Interrupted):
        fit(ArraySource(ROWS), request(n_components=2), tmp_path / "other", StopAt(2))
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(RunError, match="n_components was 3 and is now 2"):
        run(tmp_path / "other", n_components=2)


@pytest.mark.parametrize("payload", [b"", b"junk", b"\0" * 100])
def test_a_damaged_model_is_told_and_not_overwritten(tmp_path, payload):
    run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(payload)
    for max_iter in (3, 5):
        with pytest.raises(DamagedFileError, match=r"run/model\.safetensors"):
            run(tmp_path / "run", max_iter=max_iter)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == payload


def test_the_newest_checkpoint_damaged_gives_the_same_result_from_the_older(tmp_path):
    straight = fit(ArraySource(ROWS), request(max_iter=6))
    run(tmp_path / "run", max_iter=4)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    os.truncate(newest, newest.stat().st_size // 2)
    assert run(tmp_path / "run", max_iter=6).mixture.digest == straight.mixture.digest


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_components": 0}, "n_components must be at least 1; got 0"),
        ({"n_components": 3001}, "n_components is 3001 and array has only 3000 rows"),
        ({"tol": float("nan")}, "tol must be at least 0; got nan"),
        ({"max_iter": -1}, "max_iter must be at least 0; got -1"),
        ({"max_passes": float("nan")}, "max_passes must be at least 0; got nan"),
        ({"max_passes": -1.0}, "max_passes must be at least 0"),
        ({"checkpoint_every": float("nan")}, "checkpoint_every must be at least 0; got nan"),
        ({"reg_covar": -1.0}, "reg_covar must be at least 0 and finite; got -1.0"),
        ({"reg_covar": float("inf")}, "reg_covar must be at least 0 and finite; got inf"),
        ({"reg_covar": float("nan")}, "reg_covar must be at least 0 and finite; got nan"),
        ({"n_init": 0}, "n_init must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"memory_limit": 1}, "memory limit 1 B is too small"),
        ({"init": "nonsense"}, "init must be one of .*; got 'nonsense'"),
        ({"precision": "low"}, "precision must be .*; got 'low'"),
        ({"covariance_type": "round"}, "covariance_type must be .*; got 'round'"),
        ({"device": "foo"}, "device must be .*; got 'foo'"),
        ({"device": "cuda:x"}, "device must be .*; got 'cuda:x'"),
        ({"device": "cuda:99"}, "device 'cuda:99' was asked for"),
        ({"start": Start(means=np.zeros((2, 4)))}, r"means_init must have shape \(3, 4\); got \(2, 4\)"),
        ({"start": Start(weights=np.zeros(4))}, r"weights_init must have shape \(3,\)"),
        ({"start": Start(precisions=np.zeros((4, 4)))}, r"precisions_init must have shape \(3, 4\)"),
    ],
)
def test_an_impossible_request_creates_nothing(tmp_path, changes, told):
    with pytest.raises(RequestError, match=told):
        run(tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []
