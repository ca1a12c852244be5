from __future__ import annotations

import warnings

import numpy as np
import pytest

from streamgmm.ann import Searcher, build_index, calibrate_probing, exact_neighbours, quantizer_of
from streamgmm.ann.ways import WAYS
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source
from streamgmm.mixture import Mixture
from tests.ann.cases import overlapping, rows_near

K = 15


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recall", [0.8, 0.97])
def test_searches_reach_the_recall(settings: InferenceSettings, way: str, recall: float) -> None:
    """Calibrated on some queries, faiss finds that share of their neighbours."""
    pytest.importorskip("faiss")
    mixture = overlapping(k=K)
    x, queries = rows_near(mixture, 3000), rows_near(mixture, 150, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        probing = calibrate_probing(x, queries, mixture, recall=recall, k=5, way=way, settings=settings)
    truth = exact_neighbours(open_source(x), queries, 5, settings)
    searcher = Searcher(*build_index(x, mixture, settings=settings))
    _, ids = searcher.search(queries, 5, probing, quantizer_of(mixture))
    found = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids.tolist(), truth.tolist(), strict=True)])
    assert found >= recall - 1e-6


def test_a_worse_way_is_warned_of(settings: InferenceSettings) -> None:
    mixture = overlapping(k=K)
    # Variances that differ between components mislead the posterior.
    spread = mixture.covariances * np.linspace(0.05, 8, K)[:, None]
    uneven = Mixture(mixture.weights, mixture.means, spread, "diag")
    x, queries = rows_near(mixture, 3000), rows_near(mixture, 150, seed=5)
    with pytest.warns(UserWarning, match="use way 'count'"):
        calibrate_probing(x, queries, uneven, recall=0.9, way="posterior", settings=settings)


def test_what_cannot_be_is_refused(settings: InferenceSettings) -> None:
    x, queries = np.zeros((50, 5), np.float32), np.zeros((9, 5), np.float32)
    for wrong in ({"recall": 0.0}, {"recall": 1.1}, {"way": "luck"}, {"k": 0}, {"truth": np.zeros((2, 10), int)}):
        with pytest.raises(RequestError):
            calibrate_probing(x, queries, overlapping(), settings=settings, **wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="give at least one"):
        calibrate_probing(x, queries[:0], overlapping(), settings=settings)
