"""A run stopped by a signal, at whatever moment, goes on to the bits of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from streamgmm.checkpoint import Checkpoints
from tests.oracles import clustered

# More iterations than anybody waits for: the signal always comes before the end.
ENDLESS = 10**9
FIT = ("fit", "big.npy", "-k", 8, "--tol", 0, "--init", "random_from_data", "--chunk-rows", 4096)


@pytest.fixture
def data(here: Path) -> Path:
    np.save("big.npy", clustered(120_000, 8, 8, spread=1.0).astype(np.float32))
    return here


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A fit that does not end by itself, in a process of its own."""
    command = [sys.executable, "-m", "streamgmm", *FIT, "--max-iter", ENDLESS, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen([str(word) for word in command], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read its output up to the line that holds ``text``."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended without saying {text!r}: {process.communicate()[1]}")


def finish(call, folder: str = "run") -> None:
    """Resume for three iterations more than were saved; compare with a run of as many that nothing disturbed."""
    saved = call("info", folder, "--json").json.get("n_iter", 0)
    resumed = call(*FIT, "--max-iter", saved + 3, "--output", folder, "--json")
    assert resumed.status == 0, resumed.stderr
    straight = call(*FIT, "--max-iter", saved + 3, "--json")
    same = ("digest", "lower_bound", "n_iter", "n_passes", "bytes_read")
    assert {name: resumed.json[name] for name in same} == {name: straight.json[name] for name in same}
    history = [json.loads(line) for line in Path(folder, "history.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in history] == list(range(1, saved + 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_status(data, call, number):
    with started("--output", "run", "--checkpoint-every", 0) as process:
        wait_for(process, "iteration    2")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"streamgmm: error: stopped by {number.name}; run the same command again to go on\n"
    assert not Path("run", "model.safetensors").exists()
    assert call("info", "run", "--json").json["n_iter"] >= 2
    finish(call)


@pytest.mark.parametrize("stage", ["sampling", "seeding"])
def test_a_signal_before_training_leaves_a_folder_to_begin_in(data, call, stage):
    with started("--output", "run") as process:
        wait_for(process, stage)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    # The signal may arrive a moment after training has begun.
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1
    assert "stopped by SIGINT" in errors
    finish(call)


@pytest.mark.parametrize("moment", ["sampling", "training"])
def test_a_killed_process_costs_nothing_that_was_saved(data, call, moment):
    with started("--output", "run", "--checkpoint-every", 0) as process:
        wait_for(process, "seeding" if moment == "training" else moment)
        while moment == "training" and not list(Path("run", "checkpoints").glob("[0-9]*.safetensors")):
            assert process.poll() is None
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    finish(call)


def test_killed_again_and_again(data, call):
    for _ in range(2):
        with started("--output", "run", "--checkpoint-every", 0) as process:
            wait_for(process, "iteration")
            process.kill()
            process.wait(timeout=60)
    finish(call)


def test_a_second_sigint_ends_at_once_and_the_saved_state_is_whole(data, call):
    with started("--output", "run", "--checkpoint-every", 0) as process:
        wait_for(process, "iteration    2")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # click begins a new line when it is interrupted.
    assert len(errors.strip().splitlines()) == 1
    finish(call)


def test_without_output_a_signal_says_that_nothing_was_saved(data):
    with started() as process:
        wait_for(process, "iteration    1")
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].endswith("nothing was saved without --output")
    assert sorted(os.listdir()) == ["big.npy", "x.npy"]  # noqa: PTH208


def test_a_second_process_is_refused_while_the_first_works(data, call, refused):
    with started("--output", "run") as process:
        wait_for(process, "iteration    1")
        for more in ((), ("--fresh",)):
            refused(*FIT, "--output", "run", *more, told=("run", "another process is working in it"))
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    finish(call)


def test_a_full_disk_while_training_is_told_and_what_was_saved_stays(data, call, monkeypatch):
    write = Checkpoints._write_newest
    written = []

    def full_at_the_third(self: Checkpoints) -> None:
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device", "run/checkpoints")
        write(self)

    monkeypatch.setattr(Checkpoints, "_write_newest", full_at_the_third)
    outcome = call(*FIT, "--max-iter", ENDLESS, "--output", "run", "--checkpoint-every", 0)
    assert outcome.status == 1
    assert len(outcome.errors) == 1
    assert "No space left on device" in outcome.errors[0]
    monkeypatch.setattr(Checkpoints, "_write_newest", write)
    finish(call)
