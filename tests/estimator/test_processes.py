"""Estimators in other processes, as joblib and multiprocessing use them."""

from __future__ import annotations

import multiprocessing
import warnings

import numpy as np
from sklearn.model_selection import GridSearchCV

from streamgmm import GaussianMixture
from tests.oracles import clustered

X = clustered(300, 2, 3, spread=4.0)


def lower_bound(seed: int) -> float:
    return GaussianMixture(2, random_state=seed, device="cpu").fit(X).lower_bound_


def test_forked_children_fit_after_their_parent_did():
    expected = [lower_bound(seed) for seed in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads do not survive a fork is the point
        with multiprocessing.get_context("fork").Pool(1) as children:
            assert children.map_async(lower_bound, [0, 1]).get(timeout=120) == expected


def test_a_grid_in_two_processes_finds_what_one_finds():
    def best(n_jobs: int) -> tuple[dict[str, object], float]:
        search = GridSearchCV(GaussianMixture(random_state=0), {"n_components": [1, 2]}, cv=2, n_jobs=n_jobs).fit(X)
        return search.best_params_, search.best_score_

    assert best(2) == best(1)
    assert np.isfinite(best(1)[1])
