"""scikit-learn's own estimator checks: none skipped or excused that its own mixture passes."""

from __future__ import annotations

import pytest
from sklearn.mixture import GaussianMixture as Peer
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

from streamgmm import GaussianMixture
from tests.estimator.statuses import statuses_of
from tests.oracles import COVARIANCE_TYPES

ESTIMATORS = [
    GaussianMixture(),
    *(GaussianMixture(covariance_type=kind) for kind in COVARIANCE_TYPES[1:]),
    GaussianMixture(n_components=3, n_init=2, reg_covar=1e-3, precision="high", chunk_rows=1),
]


def not_for_several_components(estimator: GaussianMixture) -> dict[str, str]:
    """As for scikit-learn's KMeans: components are seeded on drawn rows, and others are drawn where some repeat."""
    name = "check_sample_weight_equivalence_on_dense_data"
    return {} if estimator.n_components == 1 else {name: "another draw of first rows finds another optimum"}


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=not_for_several_components)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_every_check_of_scikit_learns_own_mixture_passes_here():
    ours, peers = statuses_of(GaussianMixture()), statuses_of(Peer())
    assert peers.keys() <= ours.keys()
    assert {name for name, status in ours.items() if status != "passed"} <= {
        name for name, status in peers.items() if status != "passed"
    }


def test_every_parameter_is_validated_in_scikit_learns_words():
    check_param_validation("GaussianMixture", GaussianMixture())


@pytest.mark.parametrize("estimator", [GaussianMixture(), Peer()], ids=["ours", "scikit-learn"])
def test_tags_are_scikit_learns(estimator):
    tags = estimator.__sklearn_tags__()
    assert tags.estimator_type == "density_estimator"
    assert not tags.input_tags.sparse
    assert not tags.input_tags.allow_nan
    assert not tags.target_tags.required
