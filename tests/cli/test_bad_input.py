"""Whatever is wrong is one line that names it, exit status 2, and nothing created, lost or overwritten."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamgmm import checkpoint
from streamgmm.cli import main
from tests.cli.conftest import listing

FIT = ("fit", "x.npy", "-k", 3)


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)

BAD_DATA = {
    "absent.npy": (None, ["no such file"]),
    "empty.npy": (npy_bytes(ROWS[:0]), ["(0, 4)"]),
    "thin.npy": (npy_bytes(ROWS[:, :0]), ["(10, 0)"]),
    "rank1.npy": (npy_bytes(ROWS[0]), ["(4,)"]),
    "rank3.npy": (npy_bytes(ROWS[None]), ["(1, 10, 4)"]),
    "scalar.npy": (npy_bytes(np.float32(3)), ["()"]),
    "complex.npy": (npy_bytes(ROWS.astype(complex)), ["complex128"]),
    "text.npy": (npy_bytes(np.full((3, 2), "a")), ["<U1"]),
    "truncated.npy": (npy_bytes(ROWS)[:-1], ["truncated", "288", "287"]),
    "longer.npy": (npy_bytes(ROWS) + b"!", ["longer"]),
    "header.npy": (npy_bytes(ROWS)[:20], []),
    "nothing.npy": (b"", []),
    "junk.npy": (b"junk" * 100, []),
    "x.csv": (b"1,2,3\n", ["unknown suffix '.csv'"]),
    "truncated.fbin": (b"\x0a\0\0\0\x04\0\0\0" + ROWS.tobytes()[:-4], ["truncated"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_named(here, refused, name):
    payload, told = BAD_DATA[name]
    if payload is not None:
        Path(name).write_bytes(payload)
    before = listing(here)
    refused("fit", name, "-k", 2, "--output", "run", told=(name, *told))
    refused("fit", "x.npy", name, "-k", 2, "--output", "run", told=(name,))
    refused("info", name, told=(name, *told))
    assert listing(here) == before


def test_a_folder_is_no_data(here, refused):
    Path("folder").mkdir()
    refused("fit", "folder", "-k", 2, told=("folder", "zarr.json"))
    zarr.create_group("group.zarr")
    refused("fit", "group.zarr", "-k", 2, told=("group.zarr",))


def test_shards_that_disagree_are_both_named(here, refused):
    np.save("five.npy", np.zeros((10, 5), np.float32))
    np.save("double.npy", np.zeros((10, 4)))
    refused("fit", "x.npy", "five.npy", "-k", 2, "--output", "run", told=("five.npy", "5", "x.npy", "4"))
    refused("fit", "x.npy", "double.npy", "-k", 2, "--output", "run", told=("double.npy", "float64", "float32"))
    assert not Path("run").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7, 99_999])
def test_a_row_that_is_not_finite_is_named_with_its_file(here, refused, value, row):
    # 100,000 rows, of which a third are sampled: some of these rows are seen in the sample, others in the first pass.
    rows = np.zeros((100_000, 2), np.float32)
    rows[row, 1] = value
    np.save("bad.npy", rows)
    np.save("good.npy", np.ones((50, 2), np.float32))
    told = (f"row {row} of bad.npy", "column 1", str(value))
    refused("fit", "good.npy", "bad.npy", "-k", 2, "--json", "--output", "run", told=told)
    assert not Path("run", "model.safetensors").exists()


@pytest.mark.parametrize("k", [0, -1, 2001, 99_999_999])
def test_impossible_numbers_of_components(here, refused, k):
    refused("fit", "x.npy", "-k", k, "--output", "run", told=("n_components", str(k)))
    assert not Path("run").exists()


BAD_OPTIONS = [
    ("-k", "x"),
    ("-k", "1.5"),
    ("--tol", "nan"),
    ("--tol", "-1"),
    ("--tol", "x"),
    ("--max-iter", "-1"),
    ("--max-passes", "nan"),
    ("--max-passes", "-1"),
    ("--reg-covar", "-1"),
    ("--reg-covar", "nan"),
    ("--reg-covar", "inf"),
    ("--seed", "-1"),
    ("--seed", "0.5"),
    ("--n-init", "0"),
    ("--init", "nonsense"),
    ("--init", "absent.npy"),
    ("--checkpoint-every", "-1"),
    ("--checkpoint-every", "nan"),
    ("--covariance", "round"),
    ("--precision", "low"),
    ("--device", "foo"),
    ("--device", "cuda:99"),
    ("--device", "cuda:x"),
    ("--device", "mps"),
    ("--memory", "0"),
    ("--memory", "-1GiB"),
    ("--memory", "nan"),
    ("--memory", "much"),
    ("--memory", ""),
    ("--chunk-rows", "0"),
    ("--chunk-rows", "inf"),
    ("--threads", "0"),
    ("--threads", "9999"),
]


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_impossible_options_are_named_with_their_value(here, refused, option, value):
    before = listing(here)
    name = option.removeprefix("--").replace("-", "_") if option != "-k" else "-k"
    line = refused("fit", "x.npy", *(() if option == "-k" else ("-k", 3)), option, value, "--output", "run").errors[0]
    assert name in line.replace("-", "_") or option in line or value in line
    assert value.removesuffix(".npy") in line
    assert listing(here) == before


def test_too_little_memory_names_what_would_do(here, refused, call):
    line = refused(*FIT, "--memory", "1B", "--output", "run", told=("1 B", "raise --memory")).errors[0]
    assert not Path("run").exists()
    enough = line.split("at least ")[1].split(" is needed")[0]
    assert call(*FIT, "--memory", enough).status == 0


@pytest.mark.parametrize(
    "option", [("--memory", "99999TiB"), ("--chunk-rows", 10**30), ("--seed", 10**40), ("--tol", "inf")]
)
def test_huge_values_that_mean_something_are_taken(here, call, option):
    assert call(*FIT, *option).status == 0


def test_means_that_do_not_fit_are_named(here, refused):
    np.save("means.npy", np.zeros((2, 4)))
    refused(*FIT, "--init", "means.npy", "--output", "run", told=("means.npy", "(3, 4)", "(2, 4)"))
    means = np.zeros((3, 4))
    means[1, 2] = np.nan
    np.save("means.npy", means)
    refused(*FIT, "--init", "means.npy", "--output", "run", told=("row 1 of means.npy", "column 2", "nan"))
    assert not Path("run").exists()


def test_usage(here, refused):
    refused(told=("Missing command",))
    refused("nonsense", told=("nonsense",))
    refused("fit", told=("DATA",))
    refused("fit", "x.npy", told=("-k",))
    refused("fit", "x.npy", "-k", 3, "--nonsense", told=("--nonsense",))
    refused("predict", "run", told=("DATA",))
    refused("score", "run", told=("DATA",))
    refused("info", told=("PATH",))


@pytest.mark.parametrize(
    "place", ["/proc/run", "/proc", "/dev/null", "/dev/null/run", "x.npy", "x.npy/run", "full", "a" * 300]
)
def test_a_run_that_cannot_be_there(here, refused, place):
    Path("full").mkdir()
    Path("full", "thesis.tex").write_text("mine")
    before = listing(here)
    refused(*FIT, "--output", place, told=(place,))
    refused(*FIT, "--output", place, "--fresh", told=(place,))
    assert listing(here) == before


def test_a_run_of_other_data_or_settings(here, call, refused):
    assert call(*FIT, "--output", "run").status == 0
    np.save("y.npy", np.load("x.npy") + 1)
    before = listing(here)
    refused(*FIT, "--output", "run", "--seed", 7, told=("run", "seed was 0 and is now 7", "--fresh"))
    refused("fit", "x.npy", "-k", 4, "--output", "run", told=("n_components was 3 and is now 4",))
    refused("fit", "y.npy", "-k", 3, "--output", "run", told=("the data changed",))
    refused("fit", "x.npy", "x.npy", "-k", 3, "--output", "run", told=("the data changed",))
    assert listing(here) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("payload", [b"", b"junk", b"[]", b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}"])
def test_a_damaged_run(here, call, refused, name, payload):
    assert call(*FIT, "--output", "run").status == 0
    Path("run", name).write_bytes(payload)
    before = listing(here)
    refused(*FIT, "--output", "run", told=(f"run/{name}",))
    if name == "model.safetensors":
        for command in (("info", "run"), ("score", "run", "x.npy"), ("predict", "run", "x.npy", "out.npy")):
            refused(*command, told=(f"run/{name}",))
    assert listing(here) == before


def test_damaged_checkpoints(here, call, refused):
    assert call(*FIT, "--output", "run").status == 0
    Path("run", "model.safetensors").unlink()
    _, newest = sorted(Path("run", "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = call(*FIT, "--output", "run", "--json")
    assert outcome.status == 0
    assert outcome.json["resumed"]
    assert [line for line in outcome.stderr.splitlines() if "warning" in line and newest.name in line]
    Path("run", "model.safetensors").unlink()
    for path in Path("run", "checkpoints").iterdir():
        path.write_bytes(b"")
    before = listing(here)
    for command in ((*FIT, "--output", "run"), ("info", "run")):
        outcome = call(*command)
        assert outcome.status == 2
        assert len(outcome.errors) == 1
        assert "every checkpoint is damaged; start over with --fresh" in outcome.errors[0]
    assert listing(here) == before


@pytest.mark.parametrize("config", ["[]", "", "null"])
def test_info_of_an_unfinished_run_with_damaged_settings(here, refused, config):
    Path("run", "checkpoints").mkdir(parents=True)
    Path("run", "config.json").write_text(config)
    refused("info", "run", told=("run/config.json",))


@pytest.fixture
def model(here, call):
    assert call(*FIT, "--output", "run").status == 0
    return "run"


PREDICT_TO = {
    "x.npy": ("exists", "--overwrite"),
    "missing/out.npy": ("cannot be written",),
    "x.npy/out.npy": ("cannot be written",),
    "/proc/out.npy": ("cannot be written",),
    "/proc/out.zarr": ("cannot be written",),
    "/dev/null/out.npy": ("cannot be written",),
    "out.csv": (".npy or .zarr",),
    "out": (".npy or .zarr",),
}


@pytest.mark.parametrize("out", PREDICT_TO)
def test_results_that_cannot_be_written(model, here, refused, out):
    before = listing(here)
    refused("predict", model, "x.npy", out, told=(out, *PREDICT_TO[out]))
    assert listing(here) == before


def test_what_is_no_array_is_not_overwritten(model, here, refused):
    Path("folder.zarr").mkdir()
    Path("folder.zarr", "thesis.tex").write_text("mine")
    Path("folder.npy").mkdir()
    before = listing(here)
    for out in ("folder.zarr", "folder.npy"):
        refused("predict", model, "x.npy", out, "--overwrite", told=(out, "not replaced"))
    assert listing(here) == before


def test_a_bad_row_leaves_the_old_result(model, here, call, refused):
    assert call("predict", model, "x.npy", "out.npy").status == 0
    rows = np.load("x.npy")
    rows[1999, 3] = np.inf
    np.save("bad.npy", rows)
    before = listing(here)
    told = ("row 1999 of bad.npy", "column 3", "inf")
    for out in (("out.npy", "--overwrite"), ("new.npy",), ("new.zarr",)):
        refused("predict", model, "bad.npy", *out, told=told)
    refused("score", model, "bad.npy", told=told)
    assert listing(here) == before


def test_what_does_not_fit_the_model(model, here, refused):
    np.save("five.npy", np.zeros((10, 5), np.float32))
    before = listing(here)
    refused("predict", model, "five.npy", "out.npy", told=("five.npy", "5", "4"))
    refused("score", model, "five.npy", told=("five.npy", "5", "4"))
    refused("predict", model, "x.npy", "out.npy", "--top", 4, told=("--top", "4", "3"))
    refused("predict", model, "x.npy", "out.npy", "--top", 0, told=("--top", "0"))
    refused("predict", model, "x.npy", "out.npy", "--top", 4, "--proba", told=("--top",))
    refused("predict", model, "absent.npy", "out.npy", told=("absent.npy",))
    for no_model in ("absent", "x.npy", "run/checkpoints"):
        refused("predict", no_model, "x.npy", "out.npy", told=(no_model,))
        refused("score", no_model, "x.npy", told=(no_model,))
    checkpoint = sorted(Path("run", "checkpoints").iterdir())[-1]
    refused("score", checkpoint, "x.npy", told=(checkpoint.name, "not a streamgmm model"))
    assert listing(here) == before


def test_a_full_device_is_exit_status_1_in_one_line(here, refused, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    # The first write tells whether the folder can be used at all, which is a request that cannot be met.
    refused(*FIT, "--output", "run", told=("run", "No space left on device"))
    monkeypatch.undo()
    monkeypatch.chdir(here)

    def full_checkpoint(path: Path, *arguments: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_state", full_checkpoint)
    refused(*FIT, "--output", "run", told=("run/checkpoints/00000001", "No space left on device"), status=1)


def test_an_unexpected_error_is_one_line_unless_debugging(here, refused, monkeypatch, capfd):
    def broken(path: Path) -> None:
        raise RuntimeError("two\nlines")

    # The package's attribute of that name is the command.
    monkeypatch.setattr(import_module("streamgmm.cli.info"), "open_source", broken)
    refused("info", "x.npy", told=("RuntimeError: two lines", "--debug"), status=1)
    with pytest.raises(RuntimeError, match="two\nlines"):
        main(["--debug", "info", "x.npy"])


def test_the_line_reaches_a_real_terminal(here):
    command = [sys.executable, "-m", "streamgmm", "fit", "absent.npy", "-k", "2", "--output", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "streamgmm: error: absent.npy: no such file or folder; check the path\n"
    assert done.stdout == ""
    assert not Path("run").exists()


def test_a_failed_call_s_json_is_not_half_an_object(here, call):
    outcome = call("fit", "absent.npy", "-k", 2, "--json")
    assert outcome.stdout == ""
    with pytest.raises(json.JSONDecodeError):
        json.loads(outcome.stdout)
