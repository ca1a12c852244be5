"""scikit-learn's own mixture tests, run with our class in place of theirs."""

from __future__ import annotations

import inspect
import warnings
from itertools import product

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture

theirs = pytest.importorskip("sklearn.mixture.tests.test_gaussian_mixture")
theirs_too = pytest.importorskip("sklearn.mixture.tests.test_mixture")

NOT_OURS = {
    # Private functions, which have no counterpart here.
    "test_suffstat_sk_full",
    "test_suffstat_sk_tied",
    "test_suffstat_sk_diag",
    "test_gaussian_suffstat_sk_spherical",
    "test_compute_log_det_cholesky",
    "test_gaussian_mixture_log_probabilities",
    "test_gaussian_mixture_precisions_init",
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters",
    # Array API dispatch.
    "test_gaussian_mixture_array_api_compliance",
    "test_gaussian_mixture_raises_where_array_api_not_implemented",
    # Its message calls the least weight the greatest; ours does not.
    "test_check_weights",
}
FIXTURES = {"global_dtype": (np.float64, np.float32), "global_random_seed": (42,)}


def cases():
    for name, function in vars(theirs).items():
        if not name.startswith("test_") or name in NOT_OURS:
            continue
        axes = []
        for mark in getattr(function, "pytestmark", ()):
            if mark.name == "parametrize":
                names = [part.strip() for part in mark.args[0].split(",")]
                rows = [value if len(names) > 1 else (value,) for value in mark.args[1]]
                axes.append([dict(zip(names, row, strict=True)) for row in rows])
        wanted = inspect.signature(function).parameters
        axes += [[{fixture: value} for value in FIXTURES[fixture]] for fixture in FIXTURES if fixture in wanted]
        for arguments in product(*axes):
            merged = {key: value for part in arguments for key, value in part.items()}
            # score is an exact sum here, and the mean of float32 scores there: they differ in the eighth digit.
            if not (name == "test_score" and merged["global_dtype"] is np.float32):
                label = "-".join(getattr(value, "__name__", str(value)) for value in merged.values())
                yield pytest.param(function, merged, id=f"{name}[{label}]")


@pytest.mark.parametrize(("function", "arguments"), list(cases()))
def test_theirs(function, arguments, monkeypatch):
    monkeypatch.setattr(theirs, "GaussianMixture", GaussianMixture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        function(**arguments)


@pytest.mark.parametrize(
    "function",
    [theirs_too.test_gaussian_mixture_n_iter, theirs_too.test_mixture_n_components_greater_than_n_samples_error],
)
def test_theirs_for_every_mixture(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        function(GaussianMixture())


def test_what_is_left_out_is_there():
    assert vars(theirs).keys() >= NOT_OURS
