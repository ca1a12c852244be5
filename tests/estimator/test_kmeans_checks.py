"""scikit-learn's own estimator checks: none skipped or excused that its own k-means passes."""

from __future__ import annotations

import pytest
from sklearn.cluster import KMeans as Peer
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

from streamgmm import KMeans
from tests.estimator.statuses import statuses_of

EXCUSED = {
    # As of scikit-learn's own: other first rows are drawn where some repeat, and find another optimum.
    "check_sample_weight_equivalence_on_dense_data": "sample_weight is not equivalent to removing/repeating samples.",
}


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # the checks repeat a few rows
@parametrize_with_checks(
    [KMeans(), KMeans(n_clusters=2, init="random", n_init=2, max_iter=5, precision="high", chunk_rows=1)],
    expected_failed_checks=lambda estimator: EXCUSED,
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_every_check_of_scikit_learns_own_k_means_passes_here():
    ours, peers = statuses_of(KMeans()), statuses_of(Peer())
    assert {name for name in peers if "sparse_data" not in name} <= ours.keys()  # which it takes, and this does not
    assert {name for name, status in ours.items() if status != "passed"} <= {
        name for name, status in peers.items() if status != "passed"
    }


def test_every_parameter_is_validated_in_scikit_learns_words():
    check_param_validation("KMeans", KMeans())


def test_tags_are_scikit_learns_but_for_sparse_data():
    tags, peers = KMeans().__sklearn_tags__(), Peer().__sklearn_tags__()
    assert (tags.estimator_type, tags.target_tags) == (peers.estimator_type, peers.target_tags)
    assert tags.transformer_tags == peers.transformer_tags
    assert not tags.input_tags.sparse
