"""What scikit-learn's mixture tests pin, in our own words."""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture as Peer

from streamgmm import GaussianMixture
from streamgmm.seeding import INIT_METHODS
from tests.oracles import COVARIANCE_TYPES, clustered, random_mixture

DTYPES = [np.float64, np.float32]
NOT_FITTED = re.escape(
    "This GaussianMixture instance is not fitted yet. Call 'fit' with appropriate arguments before using this "
    "estimator."
)
NOT_CONVERGED = re.escape(
    "Best performing initialization did not converge. Try different init parameters, or increase max_iter, tol, or "
    "check for degenerate data."
)
COLLAPSED = re.escape(
    "Fitting the mixture model failed because some components have ill-defined empirical covariance (for instance "
    "caused by singleton or collapsed samples). Try to decrease the number of components, increase reg_covar, or scale "
    "the input data."
)


def two_clusters(seed: int = 0, distance: float = 8.0, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    return rng.normal(size=(n, 2)) + distance * labels[:, None], labels


def quietly(estimator, x, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x, **arguments)


def test_parameters_and_defaults_are_scikit_learns_and_come_first():
    theirs, ours = Peer().get_params(), GaussianMixture().get_params()
    assert {name: ours[name] for name in theirs} == theirs
    own = {"device", "precision", "memory_limit", "chunk_rows", "checkpoint", "algorithm", "sample_rows", "accelerate"}
    assert set(ours) - set(theirs) == own


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("weights_init", [[0.5], [0.5]], "The parameter 'weights' should have the shape of (2,), but got (2, 1)"),
        (
            "weights_init",
            [1.5, 1.25],
            "The parameter 'weights' should be in the range [0, 1], but got max value 1.50000, min value 1.25000",
        ),
        (
            "weights_init",
            [0.5, 0.25],
            "The parameter 'weights' should be normalized, but got sum(weights) = 0.75000",
        ),
        ("means_init", np.zeros((3, 2)), "The parameter 'means' should have the shape of (2, 2), but got (3, 2)"),
        ("means_init", [[np.nan, 0], [0, 0]], "Input means contains NaN"),
    ],
)
def test_given_weights_and_means_are_checked(name, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GaussianMixture(2, **{name: given}).fit(two_clusters()[0])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_given_precisions_are_checked(kind):
    x, _ = two_clusters()
    shape = {"full": (3, 2, 2), "tied": (3, 3), "diag": (3, 2), "spherical": (3,)}[kind]
    with pytest.raises(ValueError, match=f"The parameter '{kind} precision' should have the shape of"):
        GaussianMixture(2, covariance_type=kind, precisions_init=np.ones(shape)).fit(x)
    indefinite = np.diag([1.0, -1.0])
    skew = np.array([[1.0, 0.5], [0.0, 1.0]])
    wrong = {"full": [(indefinite,) * 2, (skew,) * 2], "tied": [indefinite, skew]}.get(kind, [])
    word = "symmetric, positive-definite"
    if kind in ("diag", "spherical"):
        wrong, word = [np.zeros((2, 2) if kind == "diag" else 2)], "positive"
    for precisions in wrong:
        with pytest.raises(ValueError, match=f"'{kind} precision' should be {word}"):
            GaussianMixture(2, covariance_type=kind, precisions_init=np.array(precisions)).fit(x)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_given_parameters_are_where_em_begins_and_stay_as_they_were(kind):
    x, _ = two_clusters()
    start = random_mixture(kind, 2, 2)
    given = {"weights_init": start.weights, "means_init": start.means.tolist(), "precisions_init": start.precisions}
    estimator = GaussianMixture(2, covariance_type=kind, max_iter=0, **given).fit(x)
    assert all(estimator.get_params()[name] is given[name] for name in given)
    np.testing.assert_allclose(estimator.weights_, start.weights)
    np.testing.assert_allclose(estimator.means_, start.means)
    np.testing.assert_allclose(estimator.precisions_, start.precisions)


def test_more_components_than_rows():
    message = "Expected n_samples >= n_components but got n_components = 12, n_samples = 10"
    for call in ("fit", "fit_predict", "partial_fit"):
        with pytest.raises(ValueError, match=message):
            getattr(GaussianMixture(12), call)(np.zeros((10, 5)))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_responsibilities_sum_to_one_and_agree_with_labels(kind):
    x, labels = two_clusters(distance=6)
    estimator = GaussianMixture(2, covariance_type=kind, random_state=0).fit(x)
    resp = estimator.predict_proba(x)
    np.testing.assert_allclose(resp.sum(1), 1)
    assert np.array_equal(resp.argmax(1), estimator.predict(x))
    assert adjusted_rand_score(labels, estimator.predict(x)) > 0.95


@pytest.mark.parametrize("method", ["predict", "predict_proba", "score", "score_samples", "bic", "aic"])
def test_not_fitted(method):
    with pytest.raises(NotFittedError, match=NOT_FITTED):
        getattr(GaussianMixture(2), method)(two_clusters()[0])
    for call in (lambda e: e.sample(0), lambda e: e.outlier_threshold([[0.0]], 0.5), lambda e: e.save("nowhere")):
        with pytest.raises(NotFittedError, match=NOT_FITTED):
            call(GaussianMixture(2))
    assert not hasattr(GaussianMixture(2), "mixture_")


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize(("max_iter", "tol"), [(0, 1e-3), (1, 1e-3), (2, 1e-7), (2, 0.1), (100, 1e-4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_predict_is_fit_and_predict(kind, max_iter, tol, dtype):
    x = clustered(300, 3, 4, spread=1.5).astype(dtype)
    settings = {"covariance_type": kind, "max_iter": max_iter, "tol": tol, "n_init": 2, "random_state": 7}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        together = GaussianMixture(3, **settings).fit_predict(x)
        apart = GaussianMixture(3, **settings).fit(x).predict(x)
    assert np.array_equal(together, apart)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_densities_keep_the_rows_type(kind, dtype):
    x = two_clusters()[0].astype(dtype)
    estimator = GaussianMixture(2, covariance_type=kind, random_state=0).fit(x)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(estimator, name).dtype == dtype, name
        assert getattr(estimator, name).flags.writeable
    assert estimator.score_samples(x).dtype == dtype
    assert estimator.predict_proba(x).dtype == dtype
    assert estimator.score_samples(x.astype(np.float64)).dtype == np.float64
    assert estimator.predict(x).dtype == np.int64
    assert estimator.sample(3)[0].dtype == np.float64
    assert isinstance(estimator.score(x), float)


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.int8, bool])
def test_other_types_give_float64_parameters(dtype):
    x = (two_clusters()[0] > 4).astype(dtype) if dtype is bool else two_clusters()[0].astype(dtype)
    assert GaussianMixture(2, random_state=0).fit(x).means_.dtype == np.float64


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("init", INIT_METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_to_begin_ends_within_the_data(kind, init, dtype):
    x = two_clusters()[0].astype(dtype)
    begun = GaussianMixture(2, covariance_type=kind, init_params=init, random_state=1, max_iter=0).fit(x)
    for a, b in itertools.combinations(begun.means_, 2):
        assert not np.allclose(a, b)
    ended = GaussianMixture(2, covariance_type=kind, init_params=init, random_state=1).fit(x)
    assert ended.converged_
    assert ended.means_.shape == (2, 2)
    assert (x.min(0) <= ended.means_).all()
    assert (ended.means_ <= x.max(0)).all()


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_recovers_the_truth(kind):
    truth = random_mixture(kind, 3, 2, seed=2, spread=20.0)
    generator = GaussianMixture(3, covariance_type=kind, random_state=0, max_iter=0, means_init=truth.means)
    generator.weights_, generator.means_, generator.covariances_ = truth.weights, truth.means, truth.covariances
    x, _ = generator.sample(20_000)
    found = GaussianMixture(3, covariance_type=kind, reg_covar=0, n_init=5, random_state=0).fit(x)
    order = np.argsort(found.means_[:, 0])[np.argsort(np.argsort(truth.means[:, 0]))]
    np.testing.assert_allclose(found.weights_[order], truth.weights, atol=0.02)
    np.testing.assert_allclose(found.means_[order], truth.means, atol=0.1)
    covariances = found.covariances_ if kind == "tied" else found.covariances_[order]
    np.testing.assert_allclose(covariances, truth.covariances, atol=0.1 * np.abs(truth.covariances).max())


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_likelihood_rises_at_every_step_without_regularisation(kind):
    x = clustered(300, 3, 2, spread=3.0)
    estimator = GaussianMixture(
        3, covariance_type=kind, reg_covar=0, warm_start=True, max_iter=1, tol=1e-7, random_state=0
    )
    before = -np.inf
    for _ in range(600):
        likelihood = quietly(estimator, x).score(x)
        assert likelihood >= before
        before = likelihood
        if estimator.converged_:
            break
    assert estimator.converged_


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_warm_start_one_and_one_are_two(kind):
    x = np.random.default_rng(1).random((500, 2))
    settings = {"covariance_type": kind, "reg_covar": 0, "random_state": 5}
    two = quietly(GaussianMixture(2, max_iter=2, **settings), x)
    ones = quietly(GaussianMixture(2, max_iter=1, warm_start=True, **settings), x)
    first = ones.score(x)
    quietly(ones, x)
    for name in ("weights_", "means_", "precisions_"):
        np.testing.assert_allclose(getattr(ones, name), getattr(two, name), rtol=1e-9)
    assert ones.score(x) > first


@pytest.mark.parametrize("max_iter", [1, 2, 50])
def test_warm_starts_converge_and_ignore_n_init(max_iter):
    x, _ = two_clusters(distance=3)
    estimator = GaussianMixture(2, warm_start=True, max_iter=max_iter, n_init=3, random_state=0)
    for _ in range(100):
        quietly(estimator, x)
        assert estimator.n_iter_ <= max_iter
        if estimator.converged_:
            break
    assert estimator.converged_
    settled = estimator.means_.copy()
    np.testing.assert_allclose(estimator.fit(x).means_, settled, atol=0.05)


def test_no_iterations_give_the_start_without_a_warning():
    x, _ = two_clusters()
    estimator = GaussianMixture(2, means_init=[[20, 30], [30, 25]], max_iter=0, random_state=0).fit(x)
    np.testing.assert_allclose(estimator.means_, [[20, 30], [30, 25]])
    assert (estimator.n_iter_, estimator.converged_, estimator.lower_bounds_) == (0, False, [])
    assert estimator.lower_bound_ == -np.inf
    assert estimator.precisions_cholesky_.shape == (2, 2, 2)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_fit_that_does_not_converge_warns_where_it_was_called(kind):
    x = clustered(200, 4, 3, spread=0.5)
    for call in ("fit", "fit_predict"):
        with pytest.warns(ConvergenceWarning, match=NOT_CONVERGED) as caught:
            getattr(GaussianMixture(4, covariance_type=kind, max_iter=1, random_state=0), call)(x)
        assert caught[0].filename == __file__
    assert quietly(GaussianMixture(max_iter=1), x).n_iter_ == 1


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_more_starts_are_not_worse_and_the_best_is_kept(kind):
    x = clustered(120, 5, 3, spread=1.0)
    settings = {"covariance_type": kind, "max_iter": 5, "random_state": 3, "init_params": "random_from_data"}
    one, many = (quietly(GaussianMixture(5, n_init=n, **settings), x) for n in (1, 8))
    assert many.lower_bound_ >= one.lower_bound_
    assert many.lower_bound_ == many.lower_bounds_[-1]
    assert len(many.lower_bounds_) == many.n_iter_


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_collapsed_components_are_an_error_without_regularisation_only(kind):
    x = np.repeat([[1.0] * 5, [0.0] * 5], 5, axis=0)
    estimator = GaussianMixture(10, reg_covar=0, covariance_type=kind, random_state=0)
    with pytest.raises(ValueError, match=COLLAPSED):
        estimator.fit(x)
    estimator.set_params(reg_covar=1e-6).fit(x)
    assert np.isfinite(estimator.score_samples(x)).all()


def test_attributes_are_there_after_a_diverging_iteration():
    x = np.random.default_rng(0).random((30, 3))
    estimator = GaussianMixture(
        3,
        covariance_type="spherical",
        reg_covar=0,
        max_iter=1,
        means_init=x[:3],
        weights_init=[1 / 30, 1 / 30, 28 / 30],
        precisions_init=[1e6, 1e6, 10],
    )
    with pytest.warns(ConvergenceWarning):
        estimator.fit(x)
    assert not estimator.converged_
    assert estimator.n_iter_ == 1
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bound_", "lower_bounds_"):
        assert np.isfinite(getattr(estimator, name)).all()


def test_free_parameters():
    counted = {"spherical": 13, "diag": 21, "tied": 26, "full": 41}
    x = np.random.default_rng(0).normal(size=(50, 5))
    for kind, count in counted.items():
        fitted = GaussianMixture(2, covariance_type=kind, random_state=0).fit(x)
        assert fitted._n_parameters() == fitted.mixture_.n_parameters == count


def test_in_one_dimension_all_types_have_one_bic():
    x = np.random.default_rng(0).normal(size=(100, 1))
    values = [GaussianMixture(covariance_type=kind).fit(x).bic(x) for kind in COVARIANCE_TYPES]
    np.testing.assert_allclose(values, values[0], rtol=1e-10)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_aic_and_bic_follow_from_the_score(kind):
    x = np.random.default_rng(0).normal(size=(80, 3))
    fitted = GaussianMixture(2, covariance_type=kind, random_state=0, max_iter=200).fit(x)
    free, n = fitted._n_parameters(), len(x)
    assert np.isclose(fitted.aic(x), -2 * n * fitted.score(x) + 2 * free)
    assert np.isclose(fitted.bic(x.tolist()), -2 * n * fitted.score(x) + free * np.log(n))
    entropy = -multivariate_normal(x.mean(0), np.cov(x.T, bias=True)).logpdf(x).mean()
    assert (fitted.aic(x) - 2 * n * entropy - 2 * free) / n < 3 / np.sqrt(n)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions_are_the_inverse_of_covariances(kind, dtype):
    x = clustered(300, 3, 4).astype(dtype)
    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(x)
    chol, precisions, covariances = fitted.precisions_cholesky_, fitted.precisions_, fitted.covariances_
    tolerance = {"rtol": 1e-4 if dtype is np.float32 else 1e-9, "atol": 1e-4 if dtype is np.float32 else 1e-9}
    if kind in ("full", "tied"):
        np.testing.assert_allclose(precisions, chol @ np.swapaxes(chol, -1, -2), **tolerance)
        np.testing.assert_allclose(covariances @ precisions, np.broadcast_to(np.eye(4), covariances.shape), **tolerance)
    else:
        np.testing.assert_allclose(precisions, chol**2, **tolerance)
        np.testing.assert_allclose(precisions * covariances, 1, **tolerance)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_samples_have_the_mixtures_moments(kind):
    x = clustered(400, 3, 2, spread=7)
    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(x)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"Invalid value for 'n_samples': {n} . The sampling requires at least"):
            fitted.sample(n)
    drawn, labels = fitted.sample(20_000)
    assert labels.dtype == np.int64
    for k in range(3):
        own = drawn[labels == k]
        covariance = {
            "full": lambda k: fitted.covariances_[k],
            "tied": lambda k: fitted.covariances_,
            "diag": lambda k: np.diag(fitted.covariances_[k]),
            "spherical": lambda k: fitted.covariances_[k] * np.eye(2),
        }[kind](k)
        np.testing.assert_allclose(np.cov(own.T), covariance, atol=0.1)
        np.testing.assert_allclose(own.mean(0), fitted.means_[k], atol=0.1)
    for n in range(1, 100):
        assert fitted.sample(n)[0].shape == (n, 2)
    assert np.array_equal(fitted.sample(9)[0], fitted.sample(9)[0])


@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_the_same_seed_draws_scikit_learns_rows(kind):
    fitted = GaussianMixture(2, covariance_type=kind, random_state=3).fit(two_clusters()[0])
    for ours, theirs in zip(fitted.sample(50), fitted.to_sklearn().sample(50), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_one_component_on_three_rows_can_be_sampled():
    x = np.random.default_rng(0).normal(size=(3, 2))
    assert GaussianMixture().fit(x).sample()[0].shape == (1, 2)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_scores_rise_with_training(kind):
    x = clustered(300, 3, 3, spread=2)
    common = {"covariance_type": kind, "reg_covar": 0, "random_state": 0}
    short = quietly(GaussianMixture(3, max_iter=1, **common), x)
    long = GaussianMixture(3, **common).fit(x)
    assert np.isclose(short.score(x), short.score_samples(x).mean(), rtol=1e-12)
    assert long.score(x) > short.score(x)


def test_verbose_prints_scikit_learns_lines(capsys):
    x = clustered(200, 4, 3, spread=0.5)
    common = {"max_iter": 25, "tol": 0, "random_state": 0}
    lines = {}
    for name, make in (("ours", GaussianMixture), ("theirs", Peer)):
        quietly(make(4, verbose=1, **common), x)
        lines[name] = capsys.readouterr().out.splitlines()
    assert lines["ours"] == lines["theirs"]
    assert "  Iteration 20" in lines["ours"]
    assert lines["ours"][-1] == "Initialization did not converge."
    quietly(GaussianMixture(4, verbose=2, verbose_interval=5, **common), x)
    told = capsys.readouterr().out
    assert re.search(r"^  Iteration 5\t time lapse \d+\.\d{5}s\t ll change \d+\.\d{5}$", told, re.MULTILINE)
    assert re.search(
        r"^Initialization did not converge\. time lapse .*s\t lower bound -\d+\.\d{5}\.$", told, re.MULTILINE
    )
    GaussianMixture(2, verbose=1, n_init=2, verbose_interval=1, random_state=0).fit(x)
    told = capsys.readouterr().out
    assert "  Iteration 1 of initialization 1\n" in told
    assert "Initialization 0 converged." in told
    GaussianMixture(2, random_state=0).fit(x)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_large_offset_in_float32_keeps_its_variance(kind, device):
    x = np.random.default_rng(0).normal(1e4, 1, size=(20_000, 3)).astype(np.float32)
    fitted = GaussianMixture(covariance_type=kind, device=device, random_state=0).fit(x)
    variances = {"full": lambda c: np.diagonal(c[0]), "tied": np.diagonal}.get(kind, np.ravel)(fitted.covariances_)
    pooled = x.astype(np.float64).var(0)
    np.testing.assert_allclose(variances, pooled.mean() if kind == "spherical" else pooled, rtol=0.01)
