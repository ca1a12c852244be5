"""Reads that fail, stop short, or find the end, in every format: one line that names the file, or the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability import data_sets
from tests.reliability.test_run_faults import assert_clear
from tools.children import Children, Ended

FIT = ("-k", 3, "--max-iter", 2, "--tol", 0, "--device", "cpu", "--chunk-rows", 4096, "--json")


def fit(children: Children, path: Path, **environment: object) -> Ended:
    return children.run("fit", path.name, *FIT, cwd=path.parent, environment=environment, timeout=60)


def reads(children: Children, path: Path) -> tuple[Ended, int]:
    """A fit that nothing disturbs, and how often it reads."""
    log = path.parent / "log"
    ended = fit(children, path, FAULT_PATH=path.name, FAULT_CALLS="read", FAULT_LOG=log)
    assert ended.status == 0, ended
    return ended, len(log.read_text().splitlines()) if log.exists() else 0


def places(count: int, *, every: bool) -> list[int]:
    chosen = {1, 2, count // 3, count // 2, count - 1, count} if every else {2, count // 2}
    return sorted(chosen & set(range(1, count + 1)))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", data_sets.FORMATS)
def test_reads_that_go_wrong(failing, tmp_path, kind, every):
    path = data_sets.write(kind, tmp_path)
    whole, count = reads(failing, path)
    assert count > 3
    faults = (("EIO", 0), ("EIO", 1), ("end", 1), ("short", 0)) if every else (("EIO", 1), ("short", 0))
    for at in places(count, every=every):
        for fault, later in faults:
            where = {"FAULT_PATH": path.name, "FAULT_CALLS": "read", "FAULT_AT": at}
            ended = fit(failing, path, **where, FAULT_KIND=fault, FAULT_FROM=later)
            assert not ended.timed_out, (at, fault)
            if ended.status == 0:
                # A library may read again by itself, or read what it does not need; the result must be the same.
                assert ended.json["digest"] == whole.json["digest"], (at, fault)
            else:
                assert_clear(ended, 2)
                assert path.name in ended.stderr


@pytest.mark.parametrize("kind", data_sets.FORMATS)
def test_files_that_cannot_be_opened(failing, tmp_path, kind):
    path = data_sets.write(kind, tmp_path)
    fault = {"FAULT_PATH": path.name, "FAULT_CALLS": "open", "FAULT_AT": 2, "FAULT_FROM": 1, "FAULT_KIND": "EIO"}
    ended = fit(failing, path, **fault)
    if ended.status != 0:  # one may be all that it needs
        assert_clear(ended, 2)
        assert path.name in ended.stderr
