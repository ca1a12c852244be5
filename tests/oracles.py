"""Brute force in fp64: what the package must compute, written the slow way."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor

from streamgmm.estep import bind
from streamgmm.frame import Frame
from streamgmm.mixture import COVARIANCE_TYPES, Mixture
from streamgmm.precision import Deviation, deviation

__all__ = [
    "COVARIANCE_TYPES",
    "clustered",
    "dense_covariances",
    "deviation_of",
    "em_iteration",
    "log_joint",
    "random_mixture",
]


def dense_covariances(mixture: Mixture) -> np.ndarray:
    """(K, D, D), whatever the type."""
    k, d = mixture.means.shape
    covariances = mixture.covariances
    return {
        "full": lambda: covariances,
        "tied": lambda: np.broadcast_to(covariances, (k, d, d)),
        "diag": lambda: covariances[:, :, None] * np.eye(d),
        "spherical": lambda: covariances[:, None, None] * np.eye(d),
    }[mixture.covariance_type]()


def log_joint(x: np.ndarray, mixture: Mixture) -> np.ndarray:
    """log w_k p_k(x), (N, K), by SciPy's density."""
    dense = dense_covariances(mixture)
    columns = [
        multivariate_normal(mixture.means[k], dense[k]).logpdf(x).reshape(len(x)) for k in range(mixture.n_components)
    ]
    with np.errstate(divide="ignore"):
        return np.stack(columns, axis=1) + np.log(mixture.weights)


def deviation_of(
    mixture: Mixture, frame: Frame, precision: str, rows: Tensor, workers: int, hard: bool = False
) -> Deviation:
    """How far ``precision`` is from fp64 for ``mixture`` on ``rows``."""
    fast, exact = (bind(mixture, frame, name, rows.device, workers, hard) for name in (precision, "highest"))
    return deviation(fast, exact, rows, hard)


def em_iteration(x: np.ndarray, mixture: Mixture, reg_covar: float) -> tuple[Mixture, float]:
    """One EM update with the whole N×K matrix, scatter about the new means; and the mean log-likelihood before it."""
    x = np.asarray(x, dtype=np.float64)
    joint = log_joint(x, mixture)
    log_likelihood = logsumexp(joint, axis=1)
    resp = np.exp(joint - log_likelihood[:, None])
    counts = resp.sum(0)
    means = resp.T @ x / counts[:, None]
    k, d = means.shape
    full = np.empty((k, d, d))
    for i in range(k):
        difference = x - means[i]
        full[i] = (resp[:, i, None] * difference).T @ difference / counts[i]
    covariances = {
        "full": lambda: full + reg_covar * np.eye(d),
        "tied": lambda: (counts[:, None, None] * full).sum(0) / counts.sum() + reg_covar * np.eye(d),
        "diag": lambda: np.diagonal(full, axis1=1, axis2=2) + reg_covar,
        "spherical": lambda: np.diagonal(full, axis1=1, axis2=2).mean(1) + reg_covar,
    }[mixture.covariance_type]()
    return Mixture(counts / counts.sum(), means, covariances, mixture.covariance_type), float(log_likelihood.mean())


def random_mixture(covariance_type: str, k: int, d: int, seed: int = 0, spread: float = 3.0) -> Mixture:
    """A mixture with unequal weights and covariances of order one."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(k, d, d)) / np.sqrt(d)
    dense = root @ root.transpose(0, 2, 1) + 0.5 * np.eye(d)
    covariances = {
        "full": dense,
        "tied": dense[0],
        "diag": np.diagonal(dense, axis1=1, axis2=2),
        "spherical": np.diagonal(dense, axis1=1, axis2=2).mean(1),
    }[covariance_type]
    return Mixture(rng.dirichlet(np.full(k, 5.0)), rng.normal(size=(k, d)) * spread, covariances, covariance_type)


def clustered(n: int, k: int, d: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    """(n, d) float64 rows around k centres with unit noise."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k, d))[rng.integers(k, size=n)] * spread + rng.normal(size=(n, d))
