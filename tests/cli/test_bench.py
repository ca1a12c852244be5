"""``streamgmm bench``: figures of the right kind, and the prediction that follows from them."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from streamgmm.cli.bench import predict_pass
from streamgmm.io.ceilings import cache_rate, sample_extents, source_rate, storage_rate
from streamgmm.io.sources import open_source
from tests.io.sources.conftest import write_parquet, write_zarr
from tests.oracles import COVARIANCE_TYPES

RATES = ("cache_1_thread", "cache_8_threads", "memory_copy", "source", "kernel_rows")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    command = import_module("streamgmm.cli.bench")
    monkeypatch.setattr(command, "SECONDS", 0.02)
    monkeypatch.setattr(command, "SYNTHETIC", (3000, 5))
    monkeypatch.setattr("streamgmm.io.ceilings.SAMPLE_BYTES", 1 << 20)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_it_measures_and_predicts(here, call, kind):
    outcome = call("bench", "x.npy", "-k", 3, "--covariance", kind, "--json", "--device", "cpu")
    assert outcome.status == 0, outcome
    assert outcome.stderr == ""
    facts = outcome.json
    assert all(facts[name] > 0 for name in RATES)
    assert (facts["n_samples"], facts["n_features"], facts["read_path"]) == (2000, 4, "extents")
    assert facts["disk"] is None or facts["disk"] > 0
    assert facts["link"] is None
    assert facts["bottleneck"] in facts["stage_seconds"]
    assert facts["pass_seconds"] == max(facts["stage_seconds"].values())
    assert facts["stage_seconds"]["kernel"] == pytest.approx(2000 / facts["kernel_rows"])


def test_for_a_person_without_data(here, call, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(here))
    lines = call("bench", "--device", "cpu").stdout.splitlines()
    assert "3,000 rows of 5 features" in lines[0]
    assert any(line.startswith("  page cache, preadv, 8 threads") and line.endswith("GB/s") for line in lines)
    assert lines[-1].startswith("a pass: ")
    assert "limited by" in lines[-1]
    assert not list(here.glob("streamgmm-bench.*"))


def test_every_way_of_reading_can_be_measured(here, call, refused):
    rows = np.random.default_rng(0).random((4000, 6)).astype(np.float32)
    write_zarr(here / "z.zarr", rows, chunks=(1000, 6))
    write_parquet(here / "x.parquet", rows[:700])
    for name in ("z.zarr", "x.parquet"):
        facts = call("bench", name, "-k", 5000 if name == "z.zarr" else 2, "--device", "cpu", "--json").json
        assert facts["read_path"] == "decode"
        assert "decode" in facts["stage_seconds"]
    refused("bench", "none.npy", told=("none.npy", "no such file"))
    refused("bench", "x.npy", "-k", 0, told=("0",))


class Rows:
    shape, dtype, stored_bytes, read_path = (10**6, 100), np.dtype(np.float32), 10**8, "decode"


@pytest.mark.parametrize(
    ("change", "expected", "seconds"),
    [
        ({}, ("decode", "decode"), (4.0, 4.0)),
        ({"disk": 1e7}, ("disk", "decode"), (10.0, 4.0)),
        ({"disk": None}, ("decode", "decode"), (4.0, 4.0)),
        ({"link": 5e7}, ("link", "link"), (8.0, 8.0)),
        ({"kernel_rows": 5e4}, ("kernel", "kernel"), (20.0, 20.0)),
    ],
)
def test_the_slowest_stage_sets_the_pace(change, expected, seconds):
    rates = {"disk": 1e9, "source": 1e8, "link": 1e9, "kernel_rows": 1e6, **change}
    facts = predict_pass(Rows(), rates)
    assert (facts["bottleneck"], facts["cached_bottleneck"]) == expected
    assert (facts["pass_seconds"], facts["cached_pass_seconds"]) == pytest.approx(seconds)


def test_ceilings_read_what_is_there(here):
    source = open_source(here / "x.npy")
    extents = sample_extents(source)
    assert sum(extent.length for extent in extents) == 2000 * 16
    assert sum(extent.length for extent in sample_extents(source, 1000)) == 992  # whole rows
    for threads in (1, 8):
        assert cache_rate(extents, threads, 0.01) > 0
        assert (storage_rate(extents, threads, 0.01) or 1) > 0
    assert source_rate(source, 2, 0.01) > 0
    assert sample_extents(open_source(np.eye(3))) == []
