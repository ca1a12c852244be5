"""A checkpoint that fails at any step leaves the one before it, a clear error, and nothing half-written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamgmm import storage
from streamgmm.checkpoint import Checkpoints
from streamgmm.errors import DamagedFileError
from streamgmm.storage import load_tensors, save_tensors
from tests.kills import Killed
from tests.reliability.disk import FaultyDisk, PowerCut
from tests.test_checkpoint import CPU, HISTORY, IDENTITY, bits, silent, state_of

FAULTS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "short", "short then ENOSPC", "kill")
STATES = [state_of("diag", seed) for seed in range(3)]


def steps_of_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    disk = FaultyDisk()
    with monkeypatch.context() as patched:
        patched.setattr(storage, "os", disk)
        write(folder, 2)
    return disk.calls


def write(folder: Path, *seeds: int) -> None:
    checkpoints = Checkpoints(folder, IDENTITY)
    try:
        for seed in seeds:
            checkpoints.save(STATES[seed], HISTORY)
            checkpoints.flush()
    finally:
        checkpoints.close()


def every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int, str]]:
    """A folder with one whole checkpoint for each step of writing the next."""
    calls = steps_of_a_checkpoint(tmp_path / "counted", monkeypatch)
    assert {"open", "write", "fsync", "read", "replace", "close"} <= set(calls)
    for at, name in enumerate(calls, 1):
        folder = tmp_path / str(at)
        write(folder, 0, 1)
        yield folder, at, name


def newest(folder: Path) -> object:
    checkpoints = Checkpoints(folder, IDENTITY)
    try:
        found = checkpoints.latest(CPU, silent)
    finally:
        checkpoints.close()
    assert found is not None
    return bits(found[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_step_of_a_checkpoint(tmp_path, monkeypatch, fault):
    seen = set()
    for folder, at, name in every_step(tmp_path, monkeypatch):
        disk = FaultyDisk(at, fault)
        with monkeypatch.context() as patched:
            patched.setattr(storage, "os", disk)
            error = attempt(folder)
        failed = error is not None
        assert not isinstance(error, OSError) or str(folder) in str(error.filename), (name, error)
        seen.add((name, failed))
        # Behind the rename the new one may be there although the call failed: it is whole either way.
        assert newest(folder) in ([bits(STATES[1]), bits(STATES[2])] if failed else [bits(STATES[2])]), (name, at)
        write(folder, 2)
        assert newest(folder) == bits(STATES[2])
        names = sorted(path.name for path in folder.iterdir())
        assert len([name for name in names if not name.startswith(".")]) == 2
    # Forgetting cached pages is a wish, and a half of a write is continued.
    fails = {"short": set(), "short then ENOSPC": {"write"}}.get(fault, {name for name, _ in seen} - {"posix_fadvise"})
    fails |= {"posix_fadvise"} if fault == "kill" else set()
    assert {name for name, failed in seen if failed} == fails


def attempt(folder: Path) -> BaseException | None:
    """What writing a checkpoint into ``folder`` ends with."""
    try:
        write(folder, 2)
    except (OSError, DamagedFileError, Killed) as error:
        return error
    return None


def test_power_lost_behind_every_step(tmp_path, monkeypatch):
    disk = FaultyDisk()
    with monkeypatch.context() as patched:
        patched.setattr(storage, "os", disk)
        save_tensors(tmp_path / "counted", {"a": np.arange(5.0)}, {"which": "new"})
    for at in range(len(disk.calls) + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        save_tensors(folder / "f", {"a": np.arange(3.0)}, {"which": "old"})
        cut = PowerCut(folder, at)
        with monkeypatch.context() as patched:
            patched.setattr(storage, "os", cut)
            try:
                save_tensors(folder / "f", {"a": np.arange(5.0)}, {"which": "new"})
                finished = True
            except Killed:
                finished = False
        for number, survivor in enumerate(cut.survivors()):
            (found := folder / f"survivor{number}").write_bytes(survivor["f"])
            which = load_tensors(found)[1]["which"]
            assert which == "new" if finished else which in ("old", "new")


def test_a_link_laid_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".f.tmp").symlink_to(tmp_path / "victim")
    save_tensors(tmp_path / "f", {}, {})
    assert (tmp_path / "victim").read_text() == "precious"
    assert load_tensors(tmp_path / "f") == ({}, {})


def test_nobody_else_can_open_a_file_that_is_being_written(tmp_path, monkeypatch):
    modes = []

    class Watching(FaultyDisk):
        def __getattr__(self, name):
            if name == "write":
                modes.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())
            return super().__getattr__(name)

    monkeypatch.setattr(storage, "os", Watching())
    save_tensors(tmp_path / "f", {"a": np.arange(3.0)}, {})
    assert set(modes) == {0o600}
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~storage._UMASK
