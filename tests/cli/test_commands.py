"""What each command does, prints and leaves, as documented."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy.special import logsumexp

from streamgmm import Mixture, demo
from streamgmm.cli.commands import NAMES
from tests.oracles import COVARIANCE_TYPES, log_joint

FIT = ("fit", "x.npy", "-k", 3)

CONTRACT = {
    "n_samples": int,
    "n_features": int,
    "n_components": int,
    "covariance_type": str,
    "n_iter": int,
    "n_passes": float,
    "converged": bool,
    "lower_bound": float,
    "seconds": float,
    "bytes_read": int,
    "peak_host_bytes": int,
    "peak_device_bytes": int,
    "resumed": bool,
    "digest": str,
}


def module(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamgmm", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_shows_an_example_of_every_command(call, name):
    outcome = call(*([] if name is None else [name]), "--help")
    assert outcome.status == 0
    assert outcome.stderr == ""
    assert outcome.stdout.startswith("Usage: streamgmm")
    if name is None:
        assert all(command in outcome.stdout for command in NAMES)
    else:
        assert f"Example: streamgmm {name}" in " ".join(outcome.stdout.split())
        assert "--json" in outcome.stdout
        assert call(name, "-h").stdout == outcome.stdout


def test_version(call):
    from streamgmm import __version__

    assert __version__ in call("--version").stdout


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_fit_prints_the_documented_object(here, call, kind):
    outcome = call(*FIT, "--covariance", kind, "--output", "run", "--json", "--max-iter", 2, "--tol", 0)
    assert outcome.status == 0
    assert outcome.stderr == ""
    facts = outcome.json
    assert {name: type(facts[name]) for name in CONTRACT} == CONTRACT
    assert (facts["n_samples"], facts["n_features"], facts["n_components"]) == (2000, 4, 3)
    assert (facts["covariance_type"], facts["n_iter"], facts["converged"], facts["resumed"]) == (kind, 2, False, False)
    assert facts["n_passes"] == 3.0  # sampling reads every row of so few
    assert facts["bytes_read"] == 3 * 2000 * 4 * 4
    mixture = Mixture.load("run")
    arrays = (mixture.weights, mixture.means, mixture.covariances)
    assert facts["digest"] == hashlib.sha256(b"".join(a.astype("<f8").tobytes() for a in arrays)).hexdigest()
    told = call("info", "run", "--json").json
    assert told["digest"] == facts["digest"]
    assert facts.items() <= told["result"].items()


def test_a_finished_run_asked_again_prints_the_same_and_resumed(here, call):
    first = call(*FIT, "--output", "run", "--json").json
    again = call(*FIT, "--output", "run", "--json")
    assert again.status == 0
    assert again.json == {**first, "resumed": True}
    assert "finished already" in call(*FIT, "--output", "run").stdout


def test_max_iter_reached_is_no_error(here, call):
    outcome = call(*FIT, "--max-iter", 1, "--json")
    assert outcome.status == 0
    assert outcome.json["converged"] is False
    nothing = call(*FIT, "--max-iter", 0, "--json").json
    assert (nothing["n_iter"], nothing["lower_bound"]) == (0, None)


def test_max_passes_counts_sampling(here, call):
    facts = call(*FIT, "--max-passes", 3.5, "--tol", 0, "--json").json
    assert facts["n_passes"] == 3.0
    assert facts["n_iter"] == 2


def test_more_iterations_continue_to_the_result_of_a_longer_run(here, call):
    options = ("--tol", 0, "--json", "--init", "random_from_data")
    straight = call(*FIT, *options, "--max-iter", 6).json
    assert call(*FIT, *options, "--max-iter", 2, "--output", "run").json["digest"] != straight["digest"]
    assert call(*FIT, *options, "--max-iter", 6, "--output", "run").json["digest"] == straight["digest"]


def test_what_only_changes_speed_changes_no_bit(here, call):
    options = ("--tol", 0, "--max-iter", 3, "--json")
    digests = {
        call(*FIT, *options, *more).json["digest"]
        for more in ((), ("--chunk-rows", 256), ("--threads", 1), ("--memory", "1GiB"), ("--memory", "64MiB"))
    }
    assert len(digests) == 1


def test_several_paths_are_one_data_set(here, call):
    rows = np.load("x.npy")
    np.save("a.npy", rows[:700])
    zarr.create_array("b.zarr", data=rows[700:], chunks=(100, 4))
    digests = {call("fit", *data, "-k", 3, "--json").json["digest"] for data in (("x.npy",), ("a.npy", "b.zarr"))}
    assert len(digests) == 1
    score = call("fit", "x.npy", "-k", 3, "--output", "run").status
    assert score == 0
    scores = {call("score", "run", *data, "--json").json["lower_bound"] for data in (("x.npy",), ("a.npy", "b.zarr"))}
    assert len(scores) == 1


def test_given_means_are_where_it_starts(here, call):
    np.save("means.npy", np.load("x.npy")[:3])
    facts = call(*FIT, "--init", "means.npy", "--max-iter", 0, "--output", "run", "--json").json
    assert facts["n_iter"] == 0
    np.testing.assert_array_equal(Mixture.load("run").means, np.load("x.npy")[:3])


def test_fresh_starts_over_and_keeps_the_old_run(here, call):
    first = call(*FIT, "--output", "run", "--json").json
    second = call(*FIT, "--output", "run", "--seed", 1, "--fresh", "--json").json
    assert not second["resumed"]
    assert call("info", "run.1", "--json").json["digest"] == first["digest"]


def test_fit_tells_a_person_what_matters(here, call):
    outcome = call(*FIT, "--output", "run")
    for name in (
        "rows",
        "components",
        "passes",
        "time",
        "bottleneck",
        "peak memory",
        "log-likelihood",
        "digest",
        "saved in",
    ):
        assert any(line.startswith(name) for line in outcome.stdout.splitlines()), name
    assert any(line.startswith("iteration    1") for line in outcome.stdout.splitlines())
    assert outcome.stderr == ""
    assert "nothing is saved" in call(*FIT).stdout


@pytest.fixture
def model(here, call):
    assert call(*FIT, "--output", "run", "--precision", "highest").status == 0
    return Mixture.load("run")


def read(path: str) -> np.ndarray:
    return np.load(path) if path.endswith(".npy") else np.asarray(zarr.open_array(path, mode="r")[...])


@pytest.mark.parametrize("suffix", ["npy", "zarr"])
def test_predict(model, here, call, suffix):
    joint = log_joint(np.load("x.npy").astype(np.float64), model)
    expected = np.exp(joint - logsumexp(joint, axis=1)[:, None])
    order = np.argsort(-joint, axis=1)
    exact = ("--precision", "highest", "--json")

    facts = call("predict", "run", "x.npy", f"labels.{suffix}", *exact).json
    assert (facts["n_samples"], facts["written"], facts["digest"]) == (2000, [f"labels.{suffix}"], model.digest)
    labels = read(f"labels.{suffix}")
    assert (labels.dtype, labels.shape) == (np.int32, (2000,))
    np.testing.assert_array_equal(labels, order[:, 0])

    assert call("predict", "run", "x.npy", f"top.{suffix}", "--top", 2, *exact).status == 0
    np.testing.assert_array_equal(read(f"top.{suffix}"), order[:, :2])

    assert call("predict", "run", "x.npy", f"resp.{suffix}", "--proba", *exact).status == 0
    resp = read(f"resp.{suffix}")
    assert (resp.dtype, resp.shape) == (np.float32, (2000, 3))
    np.testing.assert_allclose(resp, expected, atol=1e-6)

    facts = call("predict", "run", "x.npy", f"both.{suffix}", "--top", 2, "--proba", *exact).json
    assert facts["written"] == [f"both.{suffix}", f"both.resp.{suffix}"]
    np.testing.assert_array_equal(read(f"both.{suffix}"), order[:, :2])
    beside = read(f"both.resp.{suffix}")
    assert beside.dtype == np.float32
    np.testing.assert_allclose(beside, np.take_along_axis(expected, order[:, :2], 1), atol=1e-6)


def test_predict_overwrites_only_when_told(model, here, call):
    assert call("predict", "run", "x.npy", "out.npy").status == 0
    first = Path("out.npy").read_bytes()
    assert call("predict", "run", "x.npy", "out.npy", "--top", 2).status == 2
    assert Path("out.npy").read_bytes() == first
    assert call("predict", "run", "x.npy", "out.npy", "--top", 2, "--overwrite").status == 0
    assert np.load("out.npy").shape == (2000, 2)


def test_predict_does_not_depend_on_chunks(model, here, call):
    for i, more in enumerate(((), ("--chunk-rows", 1), ("--threads", 1), ("--memory", "64MiB"))):
        assert call("predict", "run", "x.npy", f"{i}.npy", "--proba", *more).status == 0
    assert len({Path(f"{i}.npy").read_bytes() for i in range(4)}) == 1


def test_score(model, here, call):
    exact = logsumexp(log_joint(np.load("x.npy").astype(np.float64), model), axis=1).mean()
    facts = call("score", "run", "x.npy", "--precision", "highest", "--json").json
    assert facts["lower_bound"] == pytest.approx(exact, rel=1e-10)
    assert facts["n_samples"] == 2000
    assert facts["digest"] == model.digest
    assert "nats a row" in call("score", "run/model.safetensors", "x.npy").stdout


def test_info_of_data(here, call):
    facts = call("info", "x.npy", "--json").json
    assert (facts["n_samples"], facts["n_features"], facts["dtype"], facts["bytes"]) == (2000, 4, "float32", 32_000)
    assert facts["read_path"] == "extents"
    assert "float32" in call("info", "x.npy").stdout


def test_info_of_a_model_and_of_runs(model, here, call):
    for path, kind in (("run", "run"), ("run/model.safetensors", "model")):
        facts = call("info", path, "--json").json
        assert (facts["kind"], facts["state"], facts["digest"]) == (kind, "finished", model.digest)
    Path("run/model.safetensors").unlink()
    facts = call("info", "run", "--json").json
    assert (facts["state"], facts["digest"]) == ("unfinished", model.digest)


def test_info_changes_nothing(here, call):
    Path("run").mkdir()
    Path("run", "config.json").write_text('{"n_components": 3, "shape": [9, 9]}')
    assert call("info", "run", "--json").json["state"] == "unfinished"
    assert [path.name for path in Path("run").iterdir()] == ["config.json"]


def test_demo_makes_fits_shows_and_resumes(here, call, monkeypatch):
    patches = np.random.default_rng(0).integers(0, 256, (3000, 64), dtype=np.uint8)
    monkeypatch.setattr(demo, "cut_patches", lambda: patches)
    monkeypatch.setattr(demo, "COMPONENTS", 4)
    facts = call("demo", "--output", "d", "--json").json
    assert {name: type(facts[name]) for name in CONTRACT} == CONTRACT
    assert facts["array_bytes"] == patches.size * 4
    for picture in facts["pictures"]:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(zarr.open_array("d/patches.zarr")[...], patches / np.float32(255), rtol=1e-6)
    again = call("demo", "--output", "d", "--json").json
    assert again["resumed"]
    assert again["digest"] == facts["digest"] == call("info", "d", "--json").json["digest"]


def test_demo_leaves_another_folder_alone(here, refused):
    Path("thesis").mkdir()
    Path("thesis", "thesis.tex").write_text("mine")
    refused("demo", "--output", "thesis", told=("thesis", "not a streamgmm run"))
    assert [path.name for path in Path("thesis").iterdir()] == ["thesis.tex"]


def test_python_m_streamgmm_is_the_same_command(here, call):
    done = module(*FIT, "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["digest"] == call(*FIT, "--json").json["digest"]


def test_a_terminal_that_knows_only_ascii_does_not_end_a_run(here, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = module(*FIT, "--output", "run")
    assert done.returncode == 0, done.stderr
    assert Path("run", "model.safetensors").exists()


def test_in_a_terminal(here):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "streamgmm", *(str(argument) for argument in FIT), "--output", "run"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        pieces = []
        try:
            while piece := os.read(ours, 4096):
                pieces.append(piece)
        except OSError:  # how Linux says that the other side has closed
            pass
        assert process.wait(timeout=60) == 0
    os.close(ours)
    text = b"".join(pieces).decode()
    assert "iteration    1" in text
    assert "saved in         run" in text
    assert "Traceback" not in text
