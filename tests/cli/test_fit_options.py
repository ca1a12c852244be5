"""What `fit` can be asked besides the number of components."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from streamgmm import Mixture
from streamgmm.weighting import Weighting
from tests.oracles import clustered


def fitted(call, *options, k=3):
    outcome = call("fit", "x.npy", "-k", k, "--device", "cpu", *options, "--json")
    assert outcome.status == 0, outcome.stderr
    return outcome.json


def test_several_sizes_share_the_passes_and_are_compared(call, here):
    facts = fitted(call, "--output", "run", "--holdout", 0.2, k="2,3,6")
    assert [model["n_components"] for model in facts["models"]] == [2, 3, 6]
    assert facts["best"] in facts["models"]
    assert facts["best"]["held_out"] == max(model["held_out"] for model in facts["models"])
    assert {name: facts[name] for name in facts["best"]} == facts["best"]
    assert facts["n_passes"] <= max(model["n_iter"] for model in facts["models"]) + 2
    for model in facts["models"]:
        assert Mixture.load(f"run/models/{model['n_components']}.safetensors").digest == model["digest"]
    assert call("info", "run", "--json").json["digest"] == facts["best"]["digest"]
    again = fitted(call, "--output", "run", "--holdout", 0.2, k="2,3,6")
    assert again["resumed"]
    assert again["models"] == facts["models"]
    spoken = call("fit", "x.npy", "-k", "2,3,6", "--device", "cpu", "--output", "run", "--holdout", 0.2).stdout
    assert "BIC" in spoken
    assert spoken.count("← best") == 1


def test_the_criterion_chooses_and_changing_it_does_not_fit_again(call, here):
    by_bic = fitted(call, "--output", "run", k="2,3,6")
    assert by_bic["best"]["bic"] == min(model["bic"] for model in by_bic["models"])
    by_aic = fitted(call, "--output", "run", "--criterion", "aic", k="2,3,6")
    assert by_aic["resumed"]
    assert by_aic["best"]["aic"] == min(model["aic"] for model in by_aic["models"])


def test_a_fit_with_rows_held_out_scores_them(call, here):
    facts = fitted(call, "--holdout", 0.25, "--output", "run", "--seed", 7)
    held = Weighting(holdout=0.25, seed=7).held_out(np.arange(2000))
    np.save("held.npy", np.load("x.npy")[held])
    assert call("score", "run", "held.npy", "--json").json["lower_bound"] == pytest.approx(facts["held_out"], rel=1e-5)


def test_k_means(call, here):
    facts = fitted(call, "--model", "kmeans", "--output", "run")
    x = np.load("x.npy").astype(np.float64)
    mixture = Mixture.load("run")
    distances = ((x[:, None] - mixture.means) ** 2).sum(-1)
    assert facts["inertia"] == pytest.approx(distances.min(1).sum(), rel=1e-3)
    assert (facts["model"], facts["covariance_type"]) == ("kmeans", "spherical")
    assert call("predict", "run", "x.npy", "labels.npy").status == 0
    np.testing.assert_array_equal(np.load("labels.npy").ravel(), distances.argmin(1))
    assert "inertia" in call("fit", "x.npy", "-k", 3, "--model", "kmeans", "--device", "cpu").stdout


def test_weights_beside_the_data(call, here):
    counts = np.random.default_rng(0).integers(0, 3, size=2000)
    np.save("w.npy", counts)
    np.save("means.npy", np.load("x.npy")[:3])
    weighted = fitted(call, "--weights", "w.npy", "--init", "means.npy", "--precision", "highest", "--output", "run")
    np.save("x.npy", np.repeat(np.load("x.npy"), counts, axis=0))
    assert weighted["lower_bound"] == pytest.approx(
        fitted(call, "--init", "means.npy", "--precision", "highest")["lower_bound"], rel=1e-3
    )


def test_other_weights_are_another_run(call, refused, here):
    np.save("w.npy", np.ones(2000))
    fitted(call, "--weights", "w.npy", "--output", "run")
    np.save("w.npy", np.full(2000, 2.0))
    refused("fit", "x.npy", "-k", 3, "--device", "cpu", "--weights", "w.npy", "--output", "run", told=("weights",))


def test_rows_that_are_not_finite_are_skipped_on_request(call, refused, here):
    x = np.load("x.npy")
    x[[3, 1999], [0, 3]] = [np.nan, np.inf]
    np.save("x.npy", x)
    refused("fit", "x.npy", "-k", 3, "--device", "cpu", told=("row 3 of x.npy", "column 0 is nan"))
    facts = fitted(call, "--nonfinite", "skip", "--output", "run")
    assert facts["skipped"] == 2
    assert all(json.loads(line)["skipped"] == 2 for line in (here / "run" / "history.jsonl").read_text().splitlines())
    assert (
        "2 rows that are not finite" in call("fit", "x.npy", "-k", 3, "--device", "cpu", "--nonfinite", "skip").stdout
    )


def test_seeds_from_every_row_and_extrapolated_updates(call, here):
    facts = fitted(
        call, "--init", "k-means||", "--accelerate", "squarem", "--tol", 0, "--max-iter", 6, "--output", "run"
    )
    assert facts["n_passes"] == pytest.approx(1 + 3 + 6)
    bounds = [json.loads(line)["lower_bound"] for line in (here / "run" / "history.jsonl").read_text().splitlines()]
    assert bounds == sorted(bounds)
    assert call("info", "run", "--json").json["digest"] == facts["digest"]


def test_growing_and_collapsing(call, here):
    assert fitted(call, "--split-to", 6, "--tol", 0.1, k=2)["n_components"] == 6
    means = np.load("x.npy")[:3].copy()
    means[1] = 1e5
    np.save("means.npy", means)
    # All rows are nearest to the other two, so the second starts empty.
    assert fitted(call, "--init", "means.npy", "--collapse", "drop")["n_components"] == 2
    assert fitted(call, "--init", "means.npy", "--collapse", "reseed")["n_components"] == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-k", "2,x"), ("'2,x'", "64,128,256")),
        (("-k", "2,2"), ("each number once",)),
        (("-k", "2,4", "--init", "x.npy"), ("single -k", "2,4")),
        (("-k", "3", "--weights", "none.npy"), ("none.npy", "no such file")),
        (("-k", "3", "--weights", "x.npy"), ("sample_weight", "(2000,)")),
        (("-k", "3", "--holdout", "1.5"), ("holdout", "1.5")),
        (("-k", "3", "--criterion", "held_out"), ("holdout",)),
        (("-k", "3", "--model", "kmeans", "--covariance", "full"), ("spherical", "'full'")),
        (("-k", "3", "--model", "kmeans", "--split-to", "8"), ("split_to",)),
        (("-k", "3", "--split-to", "2"), ("split_to", "got 2")),
        (("-k", "30", "--sample-rows", "29"), ("sample_rows", "at least n_components, 30", "got 29")),
    ],
)
def test_what_cannot_be_met_is_refused(refused, here, options, told):
    refused("fit", "x.npy", *options, told=told)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """70,000 rows in `many.npy`."""
    monkeypatch.chdir(tmp_path)
    np.save("many.npy", clustered(70_000, 6, 3, spread=2.0).astype(np.float32))


def test_stepwise_ends_after_five_passes_and_says_how_it_went(call, many):
    command = ("fit", "many.npy", "-k", 6, "--device", "cpu", "--algorithm", "stepwise", "--output", "run")
    spoken = call(*command)
    assert spoken.status == 0, spoken.stderr
    assert spoken.stdout.count("stepwise EM: the rows lie in no particular order (design effect ") == 2
    facts = call(*command, "--json").json
    assert facts["resumed"]
    assert facts["n_passes"] <= 5
    assert (facts["algorithm"], facts["n_iter"], facts["converged"]) == ("stepwise", 4, False)
    records = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [record["updates"] for record in records] == [50, 50, 50, 1]
    assert call("report", "run").status == 0
    verified = call("verify", "many.npy", "--against", "run", "--json").json
    assert (verified["n_bad"], verified["segments_compared"]) == (0, 69)
    rows = np.load("many.npy")
    rows[33_333, 1] += 1
    np.save("many.npy", rows)
    assert call("verify", "many.npy", "--against", "run").status == 2


def test_auto_chooses_full_batch_em_for_few_rows(call, here):
    facts = fitted(call, "--algorithm", "auto")
    assert facts["algorithm"] == "em"
    assert "2000 rows are too few" in facts["why"]
    assert facts["digest"] == fitted(call)["digest"]


def test_stepwise_refuses_several_sizes_in_one_line(refused, here):
    refused("fit", "x.npy", "-k", "2,3", "--algorithm", "stepwise", told=("n_components=(2, 3)", "give a single one"))
