"""Rows drawn from known distributions that no Gaussian mixture of moderate size fits exactly."""

from __future__ import annotations

import numpy as np


def heavy_tailed(rows: int = 400_000, features: int = 16, clusters: int = 60, freedom: float = 2.5) -> np.ndarray:
    """A mixture of Student-t distributions with random covariances, (rows, features)."""
    rng = np.random.default_rng(1)
    labels = rng.choice(clusters, rows, p=rng.dirichlet(np.full(clusters, 2.0)))
    noise = rng.normal(size=(rows, features)) / np.sqrt(rng.chisquare(freedom, rows) / freedom)[:, None]
    return _placed(noise, labels, 2.0 * rng.normal(size=(clusters, features)), _roots(rng, clusters, features))


def imbalanced(rows: int = 300_000, features: int = 24, clusters: int = 300, exponent: float = 1.2) -> np.ndarray:
    """A Gaussian mixture with correlated features whose weights fall as rank^−exponent, (rows, features)."""
    rng = np.random.default_rng(2)
    weights = np.arange(1, clusters + 1) ** -exponent
    labels = rng.choice(clusters, rows, p=weights / weights.sum())
    noise = rng.normal(size=(rows, features))
    return _placed(noise, labels, 1.2 * rng.normal(size=(clusters, features)), _roots(rng, clusters, features))


def _roots(rng: np.random.Generator, clusters: int, features: int) -> np.ndarray:
    """Square roots of covariances with eigenvalues spread over two decades, (clusters, features, features)."""
    axes = np.linalg.qr(rng.normal(size=(clusters, features, features)))[0]
    return axes * 10 ** rng.uniform(-0.5, 0.5, size=(clusters, 1, features))


def _placed(noise: np.ndarray, labels: np.ndarray, means: np.ndarray, roots: np.ndarray) -> np.ndarray:
    rows = np.empty(noise.shape, dtype=np.float32)
    for cluster in range(len(means)):
        own = labels == cluster
        rows[own] = noise[own] @ roots[cluster].T + means[cluster]
    return rows
