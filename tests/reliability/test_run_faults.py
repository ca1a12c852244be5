"""Every system call that a fit makes on its RUN folder fails once: a clear error, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import clustered
from tools.children import Children, Ended

FIT = ("fit", "x.npy", "-k", 3, "--max-iter", 3, "--tol", 0, "--device", "cpu", "--checkpoint-every", 0, "--json")
CALLS = "open,write,fsync,read,rename,unlink,mkdir,fchmod"
SAME = ("digest", "lower_bound", "n_iter", "n_passes", "bytes_read")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", clustered(3000, 3, 4, spread=2.0).astype(np.float32))
    return tmp_path


def assert_clear(ended: Ended, *statuses: int) -> None:
    """One line, and no traceback."""
    assert ended.status in statuses, ended
    lines = ended.stderr.splitlines()
    assert [line.startswith("streamgmm: error: ") for line in lines if "warning" not in line] == [True], ended.stderr
    assert "Traceback" not in ended.stderr


def steps(children: Children, folder: Path) -> tuple[Ended, list[str]]:
    """A run that nothing disturbs, and the system calls that it makes on its folder."""
    log = folder / "log"
    watched = {"FAULT_PATH": "whole", "FAULT_CALLS": CALLS, "FAULT_LOG": log}
    ended = children.run(*FIT, "--output", "whole", cwd=folder, environment=watched)
    assert ended.status == 0, ended
    return ended, [line.split()[1] for line in log.read_text().splitlines()]


def fail_everywhere(children: Children, folder: Path, kind: str, every: int) -> Iterator[tuple[int, str, Ended]]:
    """Each place, the call that failed there ("" where this run, whose checkpoints overlap otherwise, made fewer)."""
    whole, calls = steps(children, folder)
    for at in range(1 + len(kind) % every, len(calls) + 1, every):
        run, log = f"run{at}", folder / f"log{at}"
        fault = {"FAULT_PATH": run, "FAULT_CALLS": CALLS, "FAULT_AT": at, "FAULT_KIND": kind, "FAULT_LOG": log}
        ended = children.run(*FIT, "--output", run, cwd=folder, environment=fault)
        made = [line.split()[1] for line in log.read_text().splitlines()]
        yield at, made[at - 1] if len(made) >= at else "", ended
        again = children.run(*FIT, "--output", run, cwd=folder)
        assert again.status == 0, (at, made, again)
        assert {name: again.json[name] for name in SAME} == {name: whole.json[name] for name in SAME}
        assert not list((folder / run).rglob("*.tmp"))


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EROFS"])
def test_a_call_on_the_run_fails(failing, folder, kind, every):
    count = 0
    for at, call, ended in fail_everywhere(failing, folder, kind, every):
        if ended.status == 0:  # what is read or removed for tidiness alone
            assert call in ("", "unlink", "open", "read"), (at, call)
        else:
            assert_clear(ended, 1, 2)
            assert "run" in ended.stderr
        count += 1
    assert count >= (5 if every > 1 else 70)


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.long)])
def test_short_transfers_change_nothing(failing, folder, every):
    for at, call, ended in fail_everywhere(failing, folder, "short", every):
        assert ended.status == 0, (at, call, ended)


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS", "EIO"])
def test_a_disk_that_stays_broken_is_told_and_what_was_saved_stays(failing, folder, kind):
    whole, calls = steps(failing, folder)
    breaking = ("write", "fsync", "rename", "mkdir", "fchmod")
    middle = sum(call in breaking for call in calls) // 2
    fault = {"FAULT_PATH": "run", "FAULT_AT": middle, "FAULT_KIND": kind, "FAULT_FROM": 1}
    fault["FAULT_CALLS"] = ",".join(breaking)
    for _ in range(2):
        assert_clear(failing.run(*FIT, "--output", "run", cwd=folder, environment=fault), 1, 2)
        fault["FAULT_AT"] = 1
    info = failing.run("info", "run", "--json", cwd=folder)
    assert info.status == 0
    assert info.stderr == ""
    saved = list((folder / "run" / "checkpoints").glob("[0-9]*.safetensors"))
    again = failing.run(*FIT, "--output", "run", cwd=folder)
    assert again.json["digest"] == whole.json["digest"]
    assert again.json["resumed"] == bool(saved)


def test_a_device_that_is_really_full(children, folder):
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        wide = ("fit", "x.npy", "-k", 500, "--max-iter", 2, "--init", "random_from_data", "--device", "cpu", "--json")
        assert_clear(children.run(*wide, "--output", "disk/run", cwd=folder), 1)
        assert not list(disk.rglob("*.tmp"))
        shutil.rmtree(disk / "run")
        done = children.run(*FIT, "--output", "disk/run", cwd=folder)
        assert done.status == 0, done
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(children, folder):
    (folder / "run").mkdir(mode=0o500)
    assert_clear(children.run(*FIT, "--output", "run", cwd=folder), 2)
