"""Killed at any stage and called again: the same bytes, and what was finished is not made twice."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import dask.array
import numpy as np
import pytest

from streamgmm.errors import DataError, RequestError, RunError
from streamgmm.prepare import prepare
from streamgmm.prepare.workspace import Workspace
from tests.kills import Killed
from tests.prepare.conftest import contents, raw_rows

SETTINGS = {
    "steps": "drop,standardise,l2,pca=3",
    "shuffle": True,
    "holdout": 0.2,
    "ids": True,
    "shard_size": "8KiB",
    "workers": 1,
}


def partitions(x):
    return dask.array.from_array(x, chunks=(1000, 8))


@pytest.fixture
def expected(here, small_granules, monkeypatch):
    monkeypatch.setattr("streamgmm.prepare.preparation.RUN_BYTES", 1 << 16)
    (here / "whole").mkdir()
    prepare(partitions(raw_rows()), "whole/y.zarr", **SETTINGS)
    return contents(here / "whole")


def killing(monkeypatch, name, at):
    """`Workspace.<name>` never returns from its ``at``-th call."""
    real, calls = getattr(Workspace, name), [0]

    def step(self, *arguments):
        calls[0] += 1
        if calls[0] == at:
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(Workspace, name, step)


def test_killed_after_any_file(here, expected, monkeypatch):
    """Every stage has its turn: staging, two surveys, sorting, writing."""
    stages, at = set(), 1
    while True:
        with monkeypatch.context() as patch:
            killing(patch, "note", at)
            try:
                prepare(partitions(raw_rows()), "y.zarr", **SETTINGS)
            except Killed:
                journal = here / "y.zarr.preparing" / "journal.jsonl"
                lines = journal.read_text().split("\n")[1:] if journal.exists() else []
                assert len(lines) == at - 1
                stages |= {json.loads(line)["file"].split("/")[0] for line in lines}
                assert not (here / "y.zarr").exists()
            else:
                break
        if at % 3 == 0:
            result = prepare(partitions(raw_rows()), "y.zarr", **SETTINGS)
            assert result.resumed
            assert contents(here / "whole") == {
                name: value for name, value in contents(here).items() if name.startswith("y.")
            }
            assert not (here / "y.zarr.preparing").exists()
            for path in here.glob("y.*"):
                shutil.rmtree(path)
        else:
            shutil.rmtree("y.zarr.preparing")
        at += 1
    assert stages == {"staged", "survey-0", "survey-1", "runs", "rows", "held-out"}
    assert at > 12


@pytest.mark.parametrize("at", range(1, 6))
def test_killed_while_publishing(here, expected, monkeypatch, at):
    calls = [0]
    real = Path.rename

    def rename(self, target):
        calls[0] += 1
        if calls[0] == at:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        if at < 5:
            patch.setattr(Path, "rename", rename)
        else:  # everything has its name, nothing is tidied up
            killing(patch, "clear", 1)
        with pytest.raises(Killed):
            prepare(partitions(raw_rows()), "y.zarr", **SETTINGS)
    result = prepare(partitions(raw_rows()), "y.zarr", **SETTINGS)
    assert result.resumed
    found = {name: value for name, value in contents(here).items() if name.startswith("y.")}
    assert found == expected
    assert not (here / "y.zarr.preparing").exists()


def test_finished_files_are_compared_and_made_again_where_they_changed(here, expected, monkeypatch):
    with monkeypatch.context() as patch:
        killing(patch, "publish", 1)
        with pytest.raises(Killed):
            prepare(partitions(raw_rows()), "y.zarr", **SETTINGS)
    inside = here / "y.zarr.preparing"
    for name in ("rows/c/1/0", "runs/000001.run", "staged/000000.npy", "survey-1/63.safetensors"):
        content = bytearray((inside / name).read_bytes())
        content[len(content) // 2] ^= 1
        (inside / name).write_bytes(content)
    (inside / "rows.ids" / "c" / "2").unlink()
    (inside / "rows" / "c" / "3" / ".0.dead.tmp").write_bytes(b"left by a killed process")
    told = []

    class Progress:
        def stage(self, name, total): ...
        def advance(self): ...
        def tell(self, text):
            told.append(text)

    prepare(partitions(raw_rows()), "y.zarr", **SETTINGS, progress=Progress())
    assert {name: value for name, value in contents(here).items() if name.startswith("y.")} == expected
    assert len(told) == 5
    assert all("is not as it was written; it is made again" in text for text in told)


COMMAND = (
    *("prepare", "x.npy", "y.zarr", "--steps", "drop,standardise,l2,pca=3", "--shuffle", "--holdout", "0.2", "--ids"),
    *("--shard-size", "8KiB", "--json"),
)

PLACES = [
    ("prepare/workspace.py:Workspace.begin", 1),
    ("prepare/surveying.py:survey_segment", 1),
    ("prepare/surveying.py:survey_segment", 2),
    ("prepare/shuffling.py:write_run", 1),
    ("prepare/shards.py:ShardWriter.write", 3),
    ("prepare/shards.py:ShardWriter._finish", 5),
    ("prepare/workspace.py:Workspace.note", 2),
    ("prepare/workspace.py:Workspace.publish", 1),
    ("prepare/workspace.py:Workspace.clear", 1),
]


@pytest.mark.long
def test_processes_that_are_really_killed(here, children):
    """SIGKILL at nine places in a row, then to the end."""
    (here / "whole").mkdir()
    np.save("whole/x.npy", raw_rows())
    assert children.run(*COMMAND, cwd=here / "whole").status == 0
    for place in PLACES:
        assert children.run(*COMMAND, cwd=here, at_call=place).status == -signal.SIGKILL, place
    facts = children.run(*COMMAND, cwd=here).json
    assert facts["resumed"]
    assert {name: value for name, value in contents(here).items() if name.startswith("y.")} == contents(here / "whole")
    assert not list(here.glob("*.preparing"))


def test_a_signal_ends_it_in_order(here, children):
    ended = children.run(*COMMAND, cwd=here, at_call=("prepare/workspace.py:Workspace.note", 4), number=signal.SIGTERM)
    assert ended.status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in ended.stderr
    assert children.run(*COMMAND, cwd=here).json["resumed"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"steps": "drop,standardise"}, "steps was"),
        ({"seed": 5}, "seed was 0 and is now 5"),
        ({"shuffle": False}, "shuffle was true and is now false"),
        ({"dtype": "float16"}, 'dtype was null and is now "float16"'),
    ],
)
def test_other_settings_are_refused(here, monkeypatch, changed, told):
    with monkeypatch.context() as patch:
        killing(patch, "note", 3)
        with pytest.raises(Killed):
            prepare("x.npy", "y.zarr", **SETTINGS)
    with pytest.raises(RunError, match=told):
        prepare("x.npy", "y.zarr", **{**SETTINGS, **changed})
    # And nothing was lost by asking.
    assert prepare("x.npy", "y.zarr", **SETTINGS).resumed
    with pytest.raises(RunError, match=told):
        prepare("x.npy", "y.zarr", **{**SETTINGS, **changed})
    fresh = prepare("x.npy", "y.zarr", **{**SETTINGS, **changed}, fresh=True)
    assert not fresh.resumed
    assert Path("y.zarr.1").exists()
    assert Path("y.ids.zarr.1").exists()


def test_a_source_that_changed_is_refused(here, monkeypatch):
    with monkeypatch.context() as patch:
        killing(patch, "note", 3)
        with pytest.raises(Killed):
            prepare("x.npy", "y.zarr", **SETTINGS)
    np.save("x.npy", raw_rows(seed=1))
    with pytest.raises(RunError, match="the source changed"):
        prepare("x.npy", "y.zarr", **SETTINGS)
    assert not prepare("x.npy", "y.zarr", **SETTINGS, fresh=True).resumed


def test_finished_already(here):
    first = prepare("x.npy", "y.zarr", **SETTINGS)
    before = contents(here)
    again = prepare("x.npy", "y.zarr", **SETTINGS)
    assert again.resumed
    assert contents(here) == before
    kept = ("n_samples", "n_held_out", "n_dropped", "transformation", "dtype", "written")
    assert {name: again.facts[name] for name in kept} == {name: first.facts[name] for name in kept}


def test_one_process_at_a_time(here):
    held = Workspace(Path("y.zarr"), fresh=False)
    with pytest.raises(RunError, match="another process is working in it"):
        prepare("x.npy", "y.zarr")
    held.close()
    prepare("x.npy", "y.zarr")


def test_what_is_not_ours_is_not_replaced(here):
    Path("y.zarr").mkdir()
    Path("y.zarr", "mine").write_text("keep")
    for fresh in (False, True):
        with pytest.raises(RequestError, match="exists and is not this preparation's"):
            prepare("x.npy", "y.zarr", fresh=fresh)
    Path("z.ids.zarr").write_text("mine")
    with pytest.raises(RequestError, match=r"z\.ids\.zarr: exists"):
        prepare("x.npy", "z.zarr", ids=True)
    assert Path("y.zarr", "mine").read_text() == "keep"
    assert not list(here.glob("*.preparing"))


def test_a_graph_that_fails_is_told_in_one_line(here):
    def broken(block):
        raise OverflowError("broken\ngraph")

    x = partitions(raw_rows()).map_blocks(broken, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    with pytest.raises(DataError, match=r"a partition cannot be computed \(OverflowError: broken graph\)"):
        prepare(x, "y.zarr")


def test_a_folder_of_somebody_else_s_is_left_alone(here):
    Path("y.zarr.preparing").mkdir()
    Path("y.zarr.preparing", "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(RunError, match="holds other files than a preparation's"):
            prepare("x.npy", "y.zarr", fresh=fresh)
    assert Path("y.zarr.preparing", "thesis.txt").read_text() == "mine"


def test_a_torn_line_of_the_journal_costs_one_file(here, monkeypatch):
    with monkeypatch.context() as patch:
        killing(patch, "note", 6)
        with pytest.raises(Killed):
            prepare("x.npy", "y.zarr", **SETTINGS)
    journal = Path("y.zarr.preparing", "journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    with monkeypatch.context() as patch:
        killing(patch, "note", 3)
        with pytest.raises(Killed):
            prepare("x.npy", "y.zarr", **SETTINGS)
    whole = [line for line in journal.read_text().split("\n") if line.endswith("}")]
    assert len(whole) == 6  # five, less the torn one, and two more
    assert prepare("x.npy", "y.zarr", **SETTINGS).resumed
