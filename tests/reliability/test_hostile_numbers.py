"""Data that breaks arithmetic: finite parameters and a likelihood that never falls, or an error with the remedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from streamgmm.errors import NumericalError, RequestError
from streamgmm.fitting import fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest
from tests.oracles import COVARIANCE_TYPES, clustered

K = 3
BASE = clustered(300, K, 4, spread=3.0)


def with_outlier(rows: np.ndarray) -> np.ndarray:
    rows = rows.copy()
    rows[17] = 1e8
    return rows


DATA: dict[str, Callable[[], np.ndarray]] = {
    "constant feature": lambda: np.hstack([BASE, np.full((len(BASE), 1), 7.5)]),
    "zero feature": lambda: np.hstack([BASE, np.zeros((len(BASE), 1))]),
    "duplicates": lambda: np.repeat(BASE[:5], 60, axis=0),
    "fewer distinct rows than components": lambda: np.repeat(BASE[:2], 100, axis=0),
    "all equal": lambda: np.full((300, 4), 3.25),
    "all zero": lambda: np.zeros((300, 4)),
    "as many rows as components": lambda: BASE[:K],
    "one more row than components": lambda: BASE[: K + 1],
    "collinear": lambda: BASE[:, :1] * np.ones((1, 4)),
    "1e-30": lambda: BASE * 1e-30,
    "1e30": lambda: BASE * 1e30,
    "1e150 in float64": lambda: BASE * 1e150,
    "denormals": lambda: BASE * 1e-42,
    "far from zero": lambda: BASE * 1e-3 + 1e6,
    "an outlier": lambda: with_outlier(BASE),
    "mixed scales": lambda: BASE * np.array([1e-12, 1.0, 1e6, 1e12]),
    "sorted": lambda: np.sort(BASE, axis=0),
    "more features than rows": lambda: np.random.default_rng(0).normal(size=(6, 20)),
}


def fitted(rows: np.ndarray, kind: str, init: str, **changes: object):
    settings = {"tol": 0.0, "max_iter": 8, "device": "cpu", "covariance_type": kind, "init": init, **changes}
    return fit(ArraySource(rows), FitRequest(n_components=min(K, len(rows)), **settings))


def assert_sound(rows: np.ndarray, kind: str, init: str, **changes: object) -> None:
    result, error = outcome(rows, kind, init, **changes)
    if result is None:
        assert "\n" not in error
        assert any(word in error for word in ("scale", "reg_covar", "precision")), error
        return
    mixture = result.mixture
    for array in (mixture.weights, mixture.means, mixture.covariances):
        assert np.isfinite(array).all()
    assert mixture.weights.min() > 0
    assert mixture.weights.sum() == pytest.approx(1)
    values = np.asarray(rows, dtype=np.float64)
    width = values.max(axis=0) - values.min(axis=0)
    room = 1e-5 * np.maximum(width, np.abs(values).max(axis=0))
    assert (mixture.means >= values.min(axis=0) - room).all()
    assert (mixture.means <= values.max(axis=0) + room).all()
    assert np.isfinite(result.lower_bounds).all()
    assert_monotone(result, float(changes.get("reg_covar", 1e-6)))


def outcome(rows: np.ndarray, kind: str, init: str, **changes: object):
    """A result, or the words of an error."""
    try:
        return fitted(rows, kind, init, **changes), ""
    except (NumericalError, RequestError) as error:
        return None, str(error)


def assert_monotone(result, reg_covar: float) -> None:
    """The likelihood never falls, but for rounding.

    Two things can make it fall, in scikit-learn too: what ``reg_covar`` adds to a variance of its own size, and a
    variance raised to the floor; components where that happens are left out of this promise.
    """
    mixture = result.mixture
    flat = mixture.covariance_type in ("diag", "spherical")
    smallest = mixture.covariances.min() if flat else np.linalg.eigvalsh(mixture.covariances).min()
    if smallest < 1e3 * reg_covar or any(record["degenerate"] or record["empty"] for record in result.history):
        return
    bounds = np.array(result.lower_bounds)
    assert (np.diff(bounds) >= -1e-5 * np.maximum(1, np.abs(bounds[:-1]))).all(), bounds


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("data", DATA)
def test_hostile_data(data, kind):
    rows = DATA[data]()
    for init in ("kmeans", "random", "random_from_data"):
        assert_sound(rows, kind, init)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
def test_hostile_data_in_narrow_types(dtype, kind):
    for data in ("duplicates", "all equal", "as many rows as components", "constant feature", "sorted"):
        assert_sound(DATA[data]().astype(dtype), kind, "kmeans")
    if np.dtype(dtype).kind == "f":
        limit = float(np.finfo(dtype).max)
        for scale in (1e-7, 1e-38, limit / 1e3):
            with np.errstate(under="ignore", over="ignore"):
                rows = (BASE / 20 * scale).astype(dtype)
            assert_sound(rows, kind, "kmeans")


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_one_row(kind):
    assert_sound(BASE[:1], kind, "kmeans")
    assert_sound(BASE[:1], kind, "random_from_data", reg_covar=0.0)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_no_regularisation(kind):
    for rows in DATA.values():
        assert_sound(rows(), kind, "kmeans", reg_covar=0.0)
