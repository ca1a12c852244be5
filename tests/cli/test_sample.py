"""``streamgmm sample`` as a user would type it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamgmm.mixture import Mixture
from streamgmm.sampling import draw
from tests.cli.conftest import listing
from tests.oracles import random_mixture


@pytest.fixture
def model(tmp_path, monkeypatch) -> Mixture:
    monkeypatch.chdir(tmp_path)
    mixture = random_mixture("full", 5, 3)
    mixture.save("model.safetensors")
    return mixture


def expected(mixture: Mixture, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    pieces = list(draw(mixture, n, seed))
    return np.concatenate([rows for rows, _ in pieces]), np.concatenate([labels for _, labels in pieces])


def read(path: str) -> np.ndarray:
    return np.load(path) if path.endswith(".npy") else np.asarray(zarr.open_array(path, mode="r")[...])


@pytest.mark.parametrize("suffix", ["npy", "zarr"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_rows_and_labels_are_those_of_the_seed(model, call, suffix, dtype):
    out = f"rows.{suffix}"
    arguments = ("sample", "model.safetensors", 70_001, out, "--seed", 7, "--dtype", dtype, "--labels", "labels.npy")
    facts = call(*arguments, "--json").json
    rows, labels = expected(model, 70_001, 7)
    assert (facts["n_samples"], facts["n_features"], facts["dtype"], facts["seed"]) == (70_001, 3, dtype, 7)
    assert facts["written"] == [out, "labels.npy"]
    assert facts["bytes"] == 70_001 * 3 * np.dtype(dtype).itemsize
    assert facts["digest"] == model.digest
    found = read(out)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, rows.astype(dtype))
    np.testing.assert_array_equal(read("labels.npy"), labels)
    assert read("labels.npy").dtype == np.int32


def test_float32_and_seed_zero_unless_told(model, call):
    outcome = call("sample", "model.safetensors", 10, "rows.npy")
    assert "10 rows × 3 float32 (120 B): rows.npy" in outcome.stdout
    np.testing.assert_array_equal(read("rows.npy"), expected(model, 10)[0].astype(np.float32))
    assert call("sample", "model.safetensors", 10, "again.npy", "--json").status == 0
    assert Path("again.npy").read_bytes() == Path("rows.npy").read_bytes()


def test_a_run_is_sampled_and_its_sample_fits_it(here, call):
    assert call("fit", "x.npy", "-k", 3, "--output", "run").status == 0
    assert call("sample", "run", 20_000, "drawn.zarr").status == 0
    of_data, of_sample = (call("score", "run", path, "--json").json["lower_bound"] for path in ("x.npy", "drawn.zarr"))
    assert of_sample == pytest.approx(of_data, abs=0.05)


@pytest.mark.parametrize("n", ["0", "-1", "1.5", "many"])
def test_impossible_numbers_of_rows(model, refused, n):
    before = listing(Path())
    refused("sample", "model.safetensors", "--", n, "rows.npy", told=(n,))
    assert listing(Path()) == before


def test_what_cannot_be_written_or_read_is_named(model, refused):
    Path("there.npy").write_bytes(b"mine")
    Path("folder").mkdir()
    before = listing(Path())
    refused("sample", "absent", 5, "rows.npy", told=("absent",))
    refused("sample", "folder", 5, "rows.npy", told=("folder/model.safetensors",))
    refused("sample", "model.safetensors", 5, "there.npy", told=("there.npy", "--overwrite"))
    refused("sample", "model.safetensors", 5, "rows.npy", "--labels", "there.npy", told=("there.npy", "--overwrite"))
    refused("sample", "model.safetensors", 5, "rows.csv", told=("rows.csv", ".npy or .zarr"))
    refused("sample", "model.safetensors", 5, "rows.npy", "--labels", "rows.npy", told=("--labels", "rows.npy"))
    refused("sample", "model.safetensors", 5, "rows.npy", "--dtype", "int8", told=("--dtype", "int8"))
    refused("sample", "model.safetensors", 5, "rows.npy", "--seed", -1, told=("--seed", "-1"))
    assert listing(Path()) == before


def test_values_that_a_type_cannot_hold_are_told_and_nothing_is_left(model, refused):
    Mixture(np.ones(1), np.full((1, 2), 1e6), np.ones((1, 2)), "diag").save("far.safetensors")
    before = listing(Path())
    refused("sample", "far.safetensors", 5, "rows.npy", "--dtype", "float16", told=("float16", "1e+06", "wider"))
    assert listing(Path()) == before


def test_an_unfinished_run_has_no_model_yet(here, call, refused):
    assert call("fit", "x.npy", "-k", 3, "--output", "run").status == 0
    Path("run", "model.safetensors").unlink()
    for command in (("sample", "run", 5, "y.npy"), ("score", "run", "x.npy"), ("predict", "run", "x.npy", "y.npy")):
        refused(*command, told=("run: is unfinished", "run its fit again"))


def test_memory_does_not_grow_with_the_rows(model):
    # 12 pieces of 32 MiB on two workers, who hold three.
    random_mixture("diag", 3, 64).save("wide.safetensors")
    code = """
import os, resource
from streamgmm.cli import main
os.cpu_count = lambda: 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    main(["sample", "wide.safetensors", str(12 * 65_536), "rows.npy", "--dtype", "float16"])
finally:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 256
    assert np.load("rows.npy", mmap_mode="r").shape == (12 * 65_536, 64)
