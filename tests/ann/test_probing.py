from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamgmm.ann.hits import HitModel, learn_hits
from streamgmm.ann.probing import Probing, rank_lists
from streamgmm.ann.quantizer import Quantizer, quantizer_of, tempered
from streamgmm.errors import DamagedFileError, RequestError
from streamgmm.mixture import COVARIANCE_TYPES
from tests.ann.cases import overlapping, rows_near
from tests.oracles import log_joint


def test_lists_by_distance(quantizer: Quantizer) -> None:
    queries = rows_near(quantizer.mixture, 30)
    ranked = rank_lists(torch.from_numpy(queries), quantizer, Probing(value=3, most=5))
    exact = ((queries.astype(np.float64)[:, None] - quantizer.centroids) ** 2).sum(2)
    np.testing.assert_array_equal(ranked.lists, exact.argsort(axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(ranked.distances, np.sort(exact, axis=1)[:, :5], rtol=1e-5)
    assert (ranked.kept(3) == 3).all()
    margin = rank_lists(torch.from_numpy(queries), quantizer, Probing(stop="margin", value=1.0))
    ordered = np.sort(exact, axis=1)
    np.testing.assert_array_equal(margin.kept(1.0), (ordered - ordered[:, :1] <= 1).sum(1))


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_lists_by_posterior_and_its_mass(covariance_type: str, temperature: float) -> None:
    quantizer = quantizer_of(overlapping(covariance_type))
    queries = rows_near(quantizer.mixture, 30)
    probing = Probing("posterior", "mass", 0.8, temperature=temperature)
    ranked = rank_lists(torch.from_numpy(queries), quantizer, probing)
    joint = log_joint(queries.astype(np.float64), tempered(quantizer.mixture, temperature))
    order = np.argsort(-joint, axis=1, kind="stable")
    np.testing.assert_array_equal(ranked.lists, order)
    resp = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
    mass = np.take_along_axis(resp, order, 1).cumsum(1)
    np.testing.assert_array_equal(ranked.kept(0.8), 1 + (mass[:, :-1] <= 0.8).sum(1))


def test_odds_learn_what_is_there(tmp_path: Path) -> None:
    """Where hits do follow a logistic law in the features, the fitted odds are calibrated."""
    rng = np.random.default_rng(0)
    quantizer = quantizer_of(overlapping(k=20))
    queries = torch.from_numpy(rows_near(quantizer.mixture, 600))
    ranked = rank_lists(queries, quantizer, Probing(most=20))
    sizes, radii = rng.integers(1, 100, 20), rng.uniform(1, 2, 20)
    rate = torch.exp(-0.7 * torch.arange(1, 21).double())
    shares = rate / rate.sum()
    found = shares.cumsum(0).expand(600, 20).float()
    hits = learn_hits(ranked.lists, ranked.distances, found, quantizer.centroids, sizes, radii)
    odds = hits.log_odds(ranked.lists, ranked.distances)
    assert odds.shape == (600, 20)
    learnt = torch.sigmoid(odds).mean(0)
    np.testing.assert_allclose(learnt[:6], shares[:6], rtol=0.15)
    hits.save(tmp_path / "h.safetensors")
    again = HitModel.load(tmp_path / "h.safetensors")
    np.testing.assert_array_equal(again.log_odds(ranked.lists, ranked.distances), odds)
    kept = rank_lists(queries, quantizer, Probing(stop="odds", value=2.0, hits=hits, most=20)).kept(2.0)
    assert kept.min() >= 1
    assert kept.float().mean() < 20
    quantizer.mixture.save(tmp_path / "m.safetensors")
    with pytest.raises(DamagedFileError, match="no hit model"):
        HitModel.load(tmp_path / "m.safetensors")


def test_odds_of_degenerate_lists() -> None:
    """Equal centroids, empty lists, queries on a centroid: finite all the same."""
    quantizer = quantizer_of(np.zeros((4, 3)))
    queries = torch.zeros(5, 3)
    ranked = rank_lists(queries, quantizer, Probing(most=4))
    found = torch.tensor([1.0, 1, 1, 1]).expand(5, 4)
    hits = learn_hits(ranked.lists, ranked.distances, found, quantizer.centroids, np.zeros(4, np.int64), np.zeros(4))
    assert torch.isfinite(hits.log_odds(ranked.lists, ranked.distances)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"ranking": "cosine"},
        {"stop": "never"},
        {"value": 0},
        {"value": float("nan")},
        {"stop": "mass", "value": -0.1},
        {"most": 0},
        {"stop": "odds"},
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Probing(**settings)


def test_centroids_alone_have_no_posterior(quantizer: Quantizer) -> None:
    alone = quantizer_of(quantizer.centroids)
    with pytest.raises(RequestError, match="no responsibilities"):
        rank_lists(torch.zeros(1, 5), alone, Probing("posterior"))
