"""Processes that are killed anywhere, and resumed, come to the bits of those that were not; and nothing grows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools.kill_harness import CASES, Harness, write_data

ROOT = Path(__file__).parents[2]


def test_killed_at_random_instants(children, tmp_path):
    write_data(tmp_path)
    harness = Harness(children, tmp_path, "cpu", random.Random(4))
    for number, name in enumerate(("diag", "starts", "spherical")):
        case = next(case for case in CASES if case.name == name)
        assert harness.run(case, number, kills=5) == []
    assert harness.killed.total() >= 3


@pytest.mark.long
def test_a_hundred_kills_over_a_dozen_runs():
    command = [sys.executable, "-m", "tools.kill_harness", "--runs", "12", "--kills", "100", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["kills"] >= 100
    assert facts["same_result"] == facts["runs"] >= 12


@pytest.mark.long
def test_two_hundred_passes_hold_what_the_first_held():
    done = subprocess.run([sys.executable, "-m", "tools.soak"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["passes"] == 200
    assert facts["data_bytes"] > facts["memory_limit"]
