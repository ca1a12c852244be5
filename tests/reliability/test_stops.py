"""A run that is asked to end does, within seconds, whatever it is waiting for; and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import clustered
from tools.children import Children

FIT = ("fit", "x.npy", "-k", 8, "--tol", 0, "--device", "cpu", "--chunk-rows", 4096, "--init", "random_from_data")
SAME = ("digest", "n_passes", "lower_bound")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", clustered(30_000, 8, 8, spread=1.0).astype(np.float32))
    return tmp_path


def saved_iterations(children: Children, folder: Path) -> int:
    seen = children.run("info", "run", "--json", cwd=folder)
    assert seen.status == 0, seen
    return int(seen.json.get("n_iter", 0))


def assert_goes_on(children: Children, folder: Path) -> None:
    iterations = saved_iterations(children, folder) + 2
    resumed = children.run(*FIT, "--max-iter", iterations, "--output", "run", "--json", cwd=folder)
    straight = children.run(*FIT, "--max-iter", iterations, "--json", cwd=folder)
    assert resumed.status == 0, resumed
    assert {name: resumed.json[name] for name in SAME} == {name: straight.json[name] for name in SAME}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["recorder.py:Recorder.chunk", "mstep.py:m_step"])
def test_every_signal_saves_and_ends(children, folder, number, place):
    ended = children.run(
        *(*FIT, "--max-iter", 10**9, "--output", "run", "--checkpoint-every", 0, "--json"),
        cwd=folder,
        at_call=(place, 7),
        number=number,
    )
    assert not ended.timed_out
    assert ended.status == 128 + number
    assert ended.stderr == f"streamgmm: error: stopped by {number.name}; run the same command again to go on\n"
    assert_goes_on(children, folder)


@pytest.mark.parametrize(
    "place",
    [
        ("seeding.py:draw_sample", 1),
        ("seeding.py:kmeans_plus_plus", 1),
        ("seeding.py:_nearer", 500),
        ("seeding.py:_lloyd", 1),
        ("mstep.py:m_step", 1),
    ],
)
def test_a_signal_in_the_middle_of_seeding_ends_at_once(children, folder, place):
    seeding = ("fit", "x.npy", "-k", 300, "--device", "cpu", "--output", "run", "--json", "--max-iter", 10**9)
    ended = children.run(*seeding, cwd=folder, at_call=place, number=signal.SIGUSR1)
    assert not ended.timed_out
    assert ended.status == 128 + signal.SIGUSR1, ended
    assert "stopped by SIGUSR1 before training began" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert list((folder / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("signals", "number"),
    [
        (((3.0, signal.SIGINT), (0.2, signal.SIGINT)), signal.SIGINT),
        (((3.0, signal.SIGTERM), (0.2, signal.SIGINT)), signal.SIGINT),
        pytest.param(((3.0, signal.SIGUSR1),), signal.SIGUSR1, marks=pytest.mark.long),
        pytest.param(((3.0, signal.SIGTERM),), signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_reads_that_hang_hold_nobody(failing, folder, signals, number):
    # Training has begun by then: opening, sampling and the first pass take fewer reads.
    hang = {"FAULT_PATH": "x.npy", "FAULT_CALLS": "read", "FAULT_AT": 60, "FAULT_KIND": "stall", "FAULT_FROM": 1}
    ended = failing.run(
        *(*FIT, "--max-iter", 10**9, "--output", "run", "--checkpoint-every", 0, "--json"),
        cwd=folder,
        environment=hang,
        signals=signals,
        timeout=40.0,
    )
    assert not ended.timed_out
    # SIGTERM, then SIGINT: whichever the process names, it ends.
    assert ended.status in {128 + number, *(128 + int(sent) for _, sent in signals)}
    told = [line for line in ended.stderr.splitlines() if line.startswith("streamgmm: error: ")]
    assert len(told) == 1, ended.stderr
    assert_goes_on(failing, folder)


@pytest.mark.long
def test_a_read_that_stalls_is_told_and_the_run_goes_on(failing, folder):
    settings = ("--max-iter", 3, "--json")
    stall = {"FAULT_PATH": "x.npy", "FAULT_CALLS": "read", "FAULT_AT": 25, "FAULT_KIND": "stall", "FAULT_SECONDS": 40}
    ended = failing.run(*FIT, *settings, cwd=folder, environment=stall)
    assert ended.status == 0
    assert "streamgmm: warning: " in ended.stderr
    assert "x.npy" in ended.stderr
    assert ended.json["digest"] == failing.run(*FIT, *settings, cwd=folder).json["digest"]


def test_the_deadline_ends_a_process_whose_main_thread_never_returns():
    program = """
import signal, sys, time
from streamgmm.cli import deadline
deadline.GRACE = {number: 0.2 for number in deadline.GRACE}
watch = deadline.Deadline()
signal.signal(signal.SIGTERM, lambda *_: None)
print("ready", flush=True)
while True:
    time.sleep(1)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "streamgmm: error: stopped by SIGTERM in the middle of work; what was saved before is intact\n"


def test_a_deadline_that_nobody_needs_leaves_nothing():
    program = """
import json, os, signal, threading
from streamgmm.cli.deadline import Deadline
files = len(os.listdir("/proc/self/fd"))
for _ in range(5):
    Deadline().close()
print(json.dumps([len(os.listdir("/proc/self/fd")) - files, threading.active_count(), signal.set_wakeup_fd(-1)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, 1, -1]
