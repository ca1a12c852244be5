"""``streamgmm report`` of runs in every state."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from streamgmm.checkpoint import Checkpoints
from streamgmm.errors import DataError
from streamgmm.report import read_run
from tests.cli.conftest import listing

FIT = ("fit", "x.npy", "-k", 3, "--max-iter", 4, "--tol", 0)


@pytest.fixture
def run(here, call) -> Path:
    assert call(*FIT, "--output", "run").status == 0
    return Path("run")


def test_a_finished_run(run, call):
    facts = call("report", "run", "--json").json
    page = Path("run/report.html").read_text()
    assert facts["written"] == "run/report.html"
    assert facts["bytes"] == len(page.encode())
    assert (facts["state"], facts["n_components"], facts["n_iter"]) == ("finished", 3, 4)
    assert facts["digest"] == call("info", "run", "--json").json["digest"]
    assert facts["digest"] in page
    for name in ("convergence", "projection", "weights", "conditions", "effective", "throughput"):
        assert f'<figure id="{name}"' in page
    first = Path("run/report.html").read_bytes()
    assert call("report", "run").stdout.startswith("run/report.html (")
    assert Path("run/report.html").read_bytes() == first
    # The folder is still a run.
    assert call(*FIT, "--output", "run", "--json").json["resumed"]


def test_history_holds_what_the_pictures_need(run):
    for line in Path("run/history.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert 1 <= record["effective_components"] <= 3
        assert record["update_bytes"] == 2000 * 4 * 4
        assert 0 <= record["update_waiting"] <= record["update_seconds"]


def test_an_unfinished_run_is_read_from_its_latest_checkpoint(run, call):
    digest = call("info", "run", "--json").json["digest"]
    Path("run/model.safetensors").unlink()
    before = listing(Path("run"))
    facts = call("report", "run", "--output", "page.html", "--json").json
    assert (facts["state"], facts["digest"], facts["n_iter"]) == ("unfinished", digest, 4)
    assert "unfinished, from its latest checkpoint" in Path("page.html").read_text()
    assert listing(Path("run")) == before


def test_a_damaged_checkpoint_is_passed_over_with_a_word(run, call):
    Path("run/model.safetensors").unlink()
    _, newest = sorted(Path("run/checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = call("report", "run")
    assert outcome.status == 0
    assert newest.name in outcome.stderr


def test_a_checkpoint_that_a_live_run_removes_is_no_error(run, monkeypatch):
    Path("run/model.safetensors").unlink()
    calls = []
    latest = Checkpoints.latest

    def removed_at_first(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise DataError("run/checkpoints/00000001.safetensors: cannot be read")
        return latest(self, *arguments)

    monkeypatch.setattr(Checkpoints, "latest", removed_at_first)
    assert not read_run("run").finished
    assert len(calls) == 2


def test_a_model_file_alone(run, call):
    Path("run/model.safetensors").rename("alone.safetensors")
    facts = call("report", "alone.safetensors", "--json").json
    assert (facts["written"], facts["n_iter"]) == ("alone.html", 0)


def test_a_torn_or_missing_history_is_no_error(run, call):
    history = Path("run/history.jsonl")
    history.write_text(history.read_text() + '{"iteration": 5, "lower_bo')
    assert call("report", "run", "--json").json["n_iter"] == 4
    whole = history.read_text().splitlines()[0]
    nonsense = ("[]", "3", "null", "[" * 99_999, '{"iteration": "1"}', whole.replace('"change": null', '"change": NaN'))
    history.write_text("\n".join([whole, *nonsense, whole.replace('"n_passes": ', '"n_passes": "x", "y": ')]))
    assert call("report", "run", "--json").json["n_iter"] == 1
    history.unlink()
    assert call("report", "run", "--json").json["n_iter"] == 0


def test_several_sizes(here, call):
    assert call("fit", "x.npy", "-k", "2,3", "--max-iter", 3, "--output", "run").status == 0
    facts = call("report", "run", "--json").json
    assert facts["n_components"] in (2, 3)
    page = Path("run/report.html").read_text()
    assert '<figure id="selection"' in page
    assert "models of 2, 3 components" in page


@pytest.mark.parametrize(("kind", "d"), [("full", 1), ("tied", 2)])
def test_every_kind_and_the_lowest_dimensions(here, call, kind, d):
    np.save("low.npy", np.load("x.npy")[:300, :d])
    assert call("fit", "low.npy", "-k", 1, "--covariance", kind, "--output", "run", "--max-iter", 2).status == 0
    assert call("report", "run").status == 0


def test_what_is_no_run_is_named(here, refused, call):
    Path("folder").mkdir()
    Path("begun").mkdir()
    Path("begun", "config.json").write_text("{}")
    before = listing(here)
    refused("report", "absent", told=("absent",))
    refused("report", "x.npy", told=("x.npy",))
    refused("report", "folder", told=("folder", "no RUN"))
    refused("report", "begun", told=("begun", "no checkpoint yet"))
    assert listing(here) == before


def test_only_a_report_is_replaced(run, refused, call):
    Path("thesis.html").write_text("<!doctype html><html><head><title>mine</title></head></html>")
    Path("page.html").mkdir()
    before = listing(Path())
    refused("report", "run", "--output", "thesis.html", told=("thesis.html", "not replaced"))
    refused("report", "run", "--output", "page.html", told=("page.html", "cannot be written"))
    refused("report", "run", "--output", "absent/page.html", told=("absent/page.html", "cannot be written"))
    refused("report", "run", "--output", "x.npy/page.html", told=("x.npy/page.html", "cannot be written"))
    assert listing(Path()) == before
    assert call("report", "run", "--output", "new.html").status == 0
    assert call("report", "run", "--output", "new.html").status == 0


def test_without_matplotlib_the_remedy_is_named(run, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused("report", "run", told=("matplotlib", "streamgmm[plot]"))
    assert not Path("run/report.html").exists()
