"""``streamgmm score``: per row, thresholds, criteria; and what must not depend on the chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

from streamgmm.cli.streaming import in_blocks
from streamgmm.mixture import Mixture
from tests.cli.conftest import listing
from tests.oracles import clustered, log_joint, random_mixture

EXACT = ("--precision", "highest", "--json")


@pytest.fixture
def scored(tmp_path, monkeypatch) -> tuple[Mixture, np.ndarray]:
    """A model, and the log-likelihoods of the 70,001 rows in ``x.npy``; more than a block."""
    monkeypatch.chdir(tmp_path)
    mixture, x = random_mixture("diag", 3, 2), clustered(70_001, 3, 2)
    mixture.save("model.safetensors")
    np.save("x.npy", x)
    return mixture, logsumexp(log_joint(x, mixture), axis=1)


@pytest.mark.parametrize("suffix", ["npy", "zarr"])
def test_every_row_s_score_is_written(scored, call, suffix):
    _, expected = scored
    out = f"scores.{suffix}"
    facts = call("score", "model.safetensors", "x.npy", "--per-row", out, *EXACT).json
    found = np.load(out) if suffix == "npy" else np.asarray(zarr.open_array(out, mode="r")[...])
    assert (found.dtype, found.shape, facts["written"]) == (np.float64, (70_001,), out)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert (facts["min"], facts["max"]) == (found.min(), found.max())


def test_criteria_are_their_formulas(scored, call):
    mixture, expected = scored
    facts = call("score", "model.safetensors", "x.npy", *EXACT).json
    assert facts["lower_bound"] == pytest.approx(expected.mean(), rel=1e-12)
    assert facts["aic"] == pytest.approx(2 * mixture.n_parameters - 2 * expected.sum(), rel=1e-12)
    assert facts["bic"] == pytest.approx(mixture.n_parameters * np.log(70_001) - 2 * expected.sum(), rel=1e-12)
    assert (facts["quantile"], facts["threshold"], facts["written"]) == (None, None, None)


@pytest.mark.parametrize("q", [0, 0.01, 0.5, 1])
def test_the_threshold_is_the_exact_quantile(scored, call, q):
    facts = call("score", "model.safetensors", "x.npy", "--quantile", q, *EXACT).json
    assert facts["threshold"] == pytest.approx(np.quantile(scored[1], q), rel=1e-10)
    plain = call("score", "model.safetensors", "x.npy", "--quantile", q, "--precision", "highest")
    assert f"threshold {facts['threshold']:.6f}" in plain.stdout


def test_nothing_depends_on_the_chunks(scored, call):
    arguments = ("score", "model.safetensors", "x.npy", "--quantile", 0.1, "--json")
    found = []
    for i, more in enumerate(((), ("--chunk-rows", 256), ("--chunk-rows", 10_007), ("--threads", 1))):
        facts = call(*arguments, "--per-row", f"{i}.npy", *more).json
        found.append([facts[name] for name in ("lower_bound", "bic", "aic", "min", "max", "threshold")])
    assert found[1:] == found[:-1]
    assert len({Path(f"{i}.npy").read_bytes() for i in range(4)}) == 1
    assert call("score", "model.safetensors", "x.npy", "--json").json["lower_bound"] == found[0][0]


@given(lengths=st.lists(st.integers(0, 25), max_size=12), rows=st.integers(1, 12))
def test_blocks_do_not_depend_on_how_the_numbers_came(lengths, rows):
    numbers = np.arange(sum(lengths), dtype=np.float64)
    blocks = list(in_blocks(np.split(numbers, np.cumsum(lengths)[:-1]) if lengths else [], rows))
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    assert all(1 <= len(block) <= rows for block in blocks)
    np.testing.assert_array_equal(np.concatenate([np.empty(0), *blocks]), numbers)


def test_impossible_requests_are_named(scored, refused):
    Path("there.npy").write_bytes(b"mine")
    before = listing(Path())
    score = ("score", "model.safetensors", "x.npy")
    refused(*score, "--quantile", "1.5", told=("--quantile", "1.5"))
    refused(*score, "--quantile", "x", told=("--quantile", "x"))
    refused(*score, "--per-row", "there.npy", told=("there.npy", "--overwrite"))
    refused(*score, "--per-row", "scores.csv", told=("scores.csv", ".npy or .zarr"))
    refused(*score, "--per-row", "absent/s.npy", told=("absent/s.npy", "cannot be written"))
    refused(*score, "--per-row", "x.npy", "--overwrite", told=("x.npy", "the data itself"))
    refused("predict", "model.safetensors", "x.npy", "x.npy", "--overwrite", told=("x.npy", "the data itself"))
    assert listing(Path()) == before


def test_a_bad_row_leaves_no_scores(scored, refused):
    rows = np.load("x.npy")
    rows[69_999, 1] = np.nan
    np.save("bad.npy", rows)
    before = listing(Path())
    told = ("row 69999 of bad.npy", "column 1", "nan")
    refused("score", "model.safetensors", "bad.npy", "--per-row", "s.npy", "--quantile", 0.1, told=told)
    assert listing(Path()) == before


def test_several_paths_are_one_data_set(scored, call):
    rows = np.load("x.npy")
    np.save("a.npy", rows[:30_000])
    np.save("b.npy", rows[30_000:])
    for out, data in (("one.npy", ("x.npy",)), ("two.npy", ("a.npy", "b.npy"))):
        assert call("predict", "model.safetensors", *data, out, "--precision", "highest").status == 0
        assert call("score", "model.safetensors", *data, "--per-row", f"s{out}", *EXACT).status == 0
    assert Path("one.npy").read_bytes() == Path("two.npy").read_bytes()
    assert Path("sone.npy").read_bytes() == Path("stwo.npy").read_bytes()
