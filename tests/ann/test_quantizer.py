from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import cluster
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture, KMeans
from streamgmm.ann.assignment import assign
from streamgmm.ann.quantizer import quantizer_of, quantizer_of_centroids, tempered
from streamgmm.errors import DataError, RequestError, RunError
from streamgmm.mixture import COVARIANCE_TYPES
from tests.ann.cases import overlapping, rows_near
from tests.oracles import log_joint


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@given(temperature=st.floats(0.1, 20))
def test_tempering_divides_log_joint_densities(covariance_type: str, temperature: float) -> None:
    mixture = overlapping(covariance_type)
    x = rows_near(mixture, 9).astype(np.float64)
    expected = log_joint(x, mixture) / temperature
    got = log_joint(x, tempered(mixture, temperature))
    difference = got - expected
    np.testing.assert_allclose(difference, difference[0, 0], atol=1e-8)


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(RequestError, match="temperature"):
        tempered(overlapping(), temperature)


def test_every_model_gives_its_means(tmp_path: Path) -> None:
    mixture = overlapping()
    mixture.save(tmp_path / "m.safetensors")
    np.save(tmp_path / "c.npy", mixture.means)
    for model in (
        mixture,
        tmp_path / "m.safetensors",
        str(tmp_path / "m.safetensors"),
        tmp_path / "c.npy",
        mixture.means,
    ):
        quantizer = quantizer_of(model)
        np.testing.assert_array_equal(quantizer.centroids, mixture.means.astype(np.float32))
    lists = assign(rows_near(mixture, 30), mixture, tmp_path / "lists")
    np.testing.assert_array_equal(quantizer_of(tmp_path / "lists").centroids, lists.centroids)
    assert quantizer_of(mixture).has_responsibilities
    assert not quantizer_of(tmp_path / "c.npy").has_responsibilities
    assert quantizer_of(mixture).digest == mixture.digest


def test_fitted_estimators() -> None:
    x = rows_near(overlapping(), 300)
    mixture = GaussianMixture(4, max_iter=2, tol=0, random_state=0, device="cpu")
    means = KMeans(4, max_iter=2, tol=0, random_state=0, device="cpu")
    theirs = cluster.KMeans(4, n_init=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for model in (mixture, means, theirs):
            model.fit(x)
    assert quantizer_of(mixture).mixture is mixture.mixture_
    for model in (means, theirs):
        quantizer = quantizer_of(model)
        np.testing.assert_array_equal(quantizer.centroids, model.cluster_centers_.astype(np.float32))
        assert not quantizer.has_responsibilities


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        quantizer_of(tmp_path / "none")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="unfinished"):
        quantizer_of(tmp_path / "run")
    with pytest.raises(RequestError, match="row 1 holds NaN"):
        quantizer_of_centroids(np.array([[0.0, 1], [np.nan, 2]]))
    with pytest.raises(RequestError, match="fit float32"):
        quantizer_of_centroids(np.array([[0.0, 1], [1e39, 2]]))
