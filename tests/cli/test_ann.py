from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from streamgmm.ann import PostingLists, Searcher
from streamgmm.mixture import Mixture
from tests.ann.cases import brute_search, overlapping, rows_near
from tests.cli.conftest import Call

K, D, N = 9, 6, 3000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, data, queries."""
    mixture = overlapping(k=K, d=D)
    mixture.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "data.npy", rows_near(mixture, N))
    np.save(tmp_path / "queries.npy", rows_near(mixture, 60, seed=4))
    return tmp_path


def test_assign_writes_lists(call: Call, folder: Path) -> None:
    out = folder / "lists"
    told = call("assign", folder, folder / "data.npy", out, "--copies", "1.5", "--json")
    assert told.status == 0, told.stderr
    facts = told.json
    assert facts["n_samples"] == N
    assert facts["copies"] == pytest.approx(1.5, abs=0.01)
    assert facts["digest"] == Mixture.load(folder).digest
    assert not facts["resumed"]
    names = sorted(path.name for path in out.iterdir())
    assert names == ["centroids.npy", "ids.npy", "offsets.npy", "postings.json"]
    offsets, ids = np.load(out / "offsets.npy"), np.load(out / "ids.npy")
    assert offsets.shape == (K + 1,)
    assert offsets.dtype == ids.dtype == np.int64
    assert offsets[-1] == len(ids) == facts["n_entries"]
    np.testing.assert_array_equal(np.unique(ids), np.arange(N))
    assert call("assign", folder, folder / "data.npy", out, "--copies", "1.5", "--json").json["resumed"]
    again = call("assign", folder, folder / "data.npy", out)
    assert again.status == 2
    assert again.errors == [
        f"streamgmm: error: {out}: holds posting lists of other data or settings; name another, or --overwrite"
    ]


def test_assign_of_several_files_with_ids_and_responsibilities(call: Call, folder: Path) -> None:
    np.save(folder / "ids.npy", np.arange(2 * N) + (1 << 50))
    told = call(
        *("assign", folder / "model.safetensors", folder / "data.npy", folder / "data.npy", folder / "out"),
        *("--policy", "resp", "--max-copies", 4, "--resp", "--ids", folder / "ids.npy"),
        *("--vectorchord", folder / "c.sql"),
    )
    assert told.status == 0, told.stderr
    lists = PostingLists.load(folder / "out")
    assert lists.resp is not None
    assert lists.ids.min() == 1 << 50
    assert f"{2 * N:,} vectors" in told.stdout
    assert (folder / "c.sql").read_text().count("\t0\t") == K


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--policy", "top1", "--strength", "1"], "strength"),
        (["--threshold", "0.1", "--copies", "1.5"], "give one of them"),
        (["--copies", "3"], "copies must be between 1 and 2"),
        (["--max-copies", "3"], "max_copies"),
        (["--policy", "resp", "--temperature", "0"], "temperature"),
        (["--ids", "none.npy"], "none.npy"),
        (["--resp"], "policy 'resp' only"),
        (["--memory", "1MiB"], "at least"),
        (["--vectorchord", "none/c.sql"], "--vectorchord: none/c.sql cannot be written"),
    ],
)
def test_assign_refuses_what_cannot_be(call: Call, folder: Path, options: list[str], word: str) -> None:
    told = call("assign", folder, folder / "data.npy", folder / "out", *options)
    assert told.status == 2
    assert len(told.errors) == 1
    assert word in told.errors[0]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["assign", "index", "evaluate"])
def test_wrong_models_and_data(call: Call, folder: Path, command: str) -> None:
    np.save(folder / "narrow.npy", np.zeros((5, 2), np.float32))
    last = {"assign": "out", "index": "out.faiss", "evaluate": "queries.npy"}[command]
    for model, data in (("none", "data.npy"), ("model.safetensors", "none.npy"), ("model.safetensors", "narrow.npy")):
        told = call(command, folder / model, folder / data, folder / last)
        assert told.status == 2
        assert len(told.errors) == 1
    assert not (folder / "out").exists()
    assert not (folder / "out.faiss").exists()


def test_index_from_a_model_and_from_lists(call: Call, folder: Path) -> None:
    pytest.importorskip("faiss")
    data, queries = folder / "data.npy", np.load(folder / "queries.npy")
    told = call("index", folder, data, folder / "a.faiss", "--json")
    assert told.status == 0, told.stderr
    assert told.json["max_copies"] == 2
    assert call("assign", folder, data, folder / "lists").status == 0
    told = call("index", folder / "lists", data, folder / "b.faiss", "--on-disk", "--shard", "32KiB", "--json")
    assert told.status == 0, told.stderr
    assert len(told.json["written"]) == 3
    one, two = (Searcher.open(folder / name).search(queries, 10, 3) for name in ("a.faiss", "b.faiss"))
    np.testing.assert_array_equal(one[1], two[1])
    refused = call("index", folder / "lists", data, folder / "c.faiss", "--policy", "top1")
    assert refused.status == 2
    assert "its lists are given" in refused.errors[0]
    refused = call("index", folder, data, folder / "a.faiss")
    assert refused.status == 2
    assert call("index", folder, data, folder / "a.faiss", "--kind", "pq", "--bits", 4, "--overwrite").status == 0


@pytest.mark.parametrize("model", ["kmeans", "gmm"])
def test_trained_out_of_core_it_serves_what_its_lists_hold(call: Call, tmp_path: Path, model: str) -> None:
    """fit, assign and index with little memory over a file; faiss then finds what brute force over the lists finds."""
    pytest.importorskip("faiss")
    n, d, k, neighbours = 60_000, 24, 40, 10
    mixture = overlapping(k=k, d=d)
    data, run, lists = (tmp_path / name for name in ("x.fbin", "run", "lists"))
    x, queries = rows_near(mixture, n), rows_near(mixture, 60, seed=4)
    data.write_bytes(np.array([n, d], "<u4").tobytes() + x.astype("<f4").tobytes())
    ids = np.random.default_rng(0).permutation(n) + (1 << 53)
    np.save(tmp_path / "ids.npy", ids)
    memory = ["--memory", "96MiB", "--chunk-rows", 4096]
    told = call("fit", data, "-k", k, "--model", model, "--max-iter", 3, "--output", run, *memory)
    assert told.status == 0, told.stderr
    assert call("assign", run, data, lists, *memory).status == 0
    index = tmp_path / "x.faiss"
    told = call(
        *("index", lists, data, index, "--ids", tmp_path / "ids.npy", "--on-disk", "--shard", "1MiB", *memory, "--json")
    )
    assert told.status == 0, told.stderr
    postings, searcher = PostingLists.load(lists), Searcher.open(index)
    assert postings.facts["copies"] > 1.1
    held = [np.array(postings.list_ids(i)) for i in range(k)]
    for probes in (1, 4, k):
        _, found = searcher.search(queries, neighbours, probes)
        assert found.tolist() == brute_search(x, ids, held, queries, postings.centroids, probes, neighbours)


def test_evaluate_reads_the_formats_of_benchmarks(call: Call, folder: Path) -> None:
    x, queries = np.load(folder / "data.npy"), np.load(folder / "queries.npy")
    truth = ((queries[:, None].astype(float) - x) ** 2).sum(2).argsort(1)[:, :20].astype("<i4")
    with h5py.File(folder / "b.hdf5", "w") as file:
        file["train"], file["test"], file["neighbors"] = x, queries, truth
    for name, rows in (("base", x), ("query", queries)):
        np.column_stack([np.full(len(rows), D, "<i4").view("<f4"), rows]).astype("<f4").tofile(folder / f"{name}.fvecs")
    np.column_stack([np.full(len(truth), 20, "<i4"), truth]).tofile(folder / "truth.ivecs")
    common = ["--seeds", 1, "--iterations", 3, "--no-speed", "--json"]
    b = folder / "b.hdf5"
    found = [
        call("evaluate", folder, f"{b}::train", f"{b}::test", "--truth", f"{b}::neighbors", *common),
        call(
            "evaluate",
            folder,
            folder / "base.fvecs",
            folder / "query.fvecs",
            "--truth",
            folder / "truth.ivecs",
            *common,
        ),
        call("evaluate", folder, folder / "data.npy", folder / "queries.npy", "--plot", folder / "p.svg", *common),
    ]
    assert [one.status for one in found] == [0, 0, 0], found[0].stderr + found[1].stderr + found[2].stderr
    tables = [{**one.json, "seconds": 0} for one in found]
    assert tables[0] == tables[1] == tables[2]
    assert tables[0]["gain_unique_at_99"] > 0
    assert {row["name"] for row in tables[0]["rows"]} >= {"k-means", "2-nearest", "SOAR", "AIR", "model, r > 1/K"}
    assert (folder / "p.svg").exists()
    plain = call("evaluate", folder, folder / "data.npy", folder / "queries.npy", *common[:-1])
    assert "fewer unique distances at 0.99 than k-means" in plain.stdout


def test_evaluate_refuses_to_draw_over_its_data(call: Call, folder: Path) -> None:
    told = call("evaluate", folder, folder / "data.npy", folder / "queries.npy", "--plot", folder / "queries.npy")
    assert told.status == 2
    assert "is the data itself" in told.errors[0]
    for name, word in (("p.gif", ".svg"), ("none/p.svg", "its folder does not exist")):
        told = call("evaluate", folder, folder / "data.npy", folder / "queries.npy", "--plot", folder / name)
        assert told.status == 2
        assert word in told.errors[0]


def test_killed_in_the_middle_assign_goes_on(call: Call, tmp_path: Path) -> None:
    """SIGKILL while lists are written, then the same command: the lists of a run that was left alone."""
    mixture = overlapping(k=40, d=24)
    mixture.save(tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", rows_near(mixture, 300_000))
    program = "import streamgmm.ann.spill as s; s.SYNC_SECONDS = 0.0\nfrom streamgmm.cli import main; main()"
    command = [sys.executable, "-c", program, "assign", str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy")]
    state = tmp_path / ".killed.partial" / "state.json"
    with subprocess.Popen([*command, str(tmp_path / "killed"), "--chunk-rows", "16384"]) as process:
        while process.poll() is None:
            if state.exists() and json.loads(state.read_text())["rows"] >= 65_536:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    done = subprocess.run([*command, str(tmp_path / "killed"), "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["resumed"]
    assert call("assign", tmp_path / "m.safetensors", tmp_path / "x.npy", tmp_path / "whole").status == 0
    for name in ("ids.npy", "offsets.npy", "centroids.npy"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
