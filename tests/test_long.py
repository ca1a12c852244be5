"""What takes minutes: memory at full size, the demo as a user runs it, and processes that are really killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamgmm.mixture import Mixture
from tests.oracles import clustered

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]


def streamgmm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamgmm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("memory", ["128MiB", "96MiB"])
def test_memory_stays_within_its_limit_on_a_larger_array(memory):
    command = [sys.executable, "tools/measure_memory.py", "--memory", memory]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    facts = json.loads(done.stdout)
    assert facts["array_bytes"] == 512_000_000
    assert facts["growth"] < facts["limit"], facts


def test_demo(tmp_path):
    run = tmp_path / "demo-run"
    done = streamgmm("demo", "--output", run, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    patches = zarr.open_array(run / "patches.zarr", mode="r")
    assert patches.shape == (facts["n_samples"], 64)
    assert facts["n_samples"] >= 1_000_000
    assert facts["memory_limit"] < facts["array_bytes"] / 2
    assert facts["lower_bound"] > json.loads((run / "history.jsonl").read_text().splitlines()[0])["lower_bound"] + 10
    assert all(Path(path).stat().st_size > 10_000 for path in facts["pictures"])
    assert len(list((run / "checkpoints").iterdir())) == 2
    whole = np.round(patches[:] * 255).astype(np.uint8)
    assert len(np.unique(whole.view("V64").reshape(-1))) == len(whole)
    again = json.loads(streamgmm("demo", "--output", run, "--json").stdout.splitlines()[-1])
    assert again["resumed"]
    assert again["digest"] == facts["digest"] == Mixture.load(run).digest


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_killed_processes_come_to_the_same_bits(kind, tmp_path):
    np.save(tmp_path / "x.npy", clustered(400_000, 8, 16).astype(np.float32))
    request = ["fit", tmp_path / "x.npy", "-k", 8, "--covariance", kind, "--tol", 0, "--max-iter", 20]
    undisturbed = json.loads(streamgmm(*request, "--output", tmp_path / "whole", "--json").stdout.splitlines()[-1])
    run, rng = tmp_path / "run", random.Random(0)
    command = [sys.executable, "-m", "streamgmm", *map(str, request), "--output", str(run), "--checkpoint-every", "0"]
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            # Killed behind some line of its output: while sampling, seeding, reading, updating or writing.
            for _, _line in zip(range(rng.randint(1, 5)), process.stdout, strict=False):
                pass
            process.kill()
    done = streamgmm(*request, "--output", run, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["digest"] == undisturbed["digest"]
    assert facts["n_iter"] == 20
    history = [json.loads(line)["iteration"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert history == list(range(1, 21))
