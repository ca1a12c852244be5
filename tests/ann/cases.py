"""Small data and brute force for it."""

from __future__ import annotations

import numpy as np

from streamgmm.ann.policies import Policy
from streamgmm.mixture import Mixture
from tests.oracles import log_joint, random_mixture


def overlapping(covariance_type: str = "diag", k: int = 7, d: int = 5, seed: int = 0) -> Mixture:
    """A mixture whose components share many of their rows."""
    return random_mixture(covariance_type, k, d, seed, spread=1.0)


def rows_near(mixture: Mixture, n: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = mixture.means[rng.integers(0, mixture.n_components, n)] + rng.normal(size=(n, mixture.n_features))
    return rows.astype(np.float32)


def brute_lists(x: np.ndarray, mixture: Mixture, policy: Policy) -> list[list[int]]:
    """The lists of each row, from the definition, in fp64."""
    x, c = x.astype(np.float64), mixture.means.astype(np.float32).astype(np.float64)
    if policy.name == "resp":
        joint = log_joint(x, mixture)
        resp = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
        threshold = 1 / len(c) if policy.threshold is None else policy.threshold
        out = []
        for row in resp:
            order = np.argsort(-row, kind="stable")
            out.append([int(order[0]), *(int(k) for k in order[1 : policy.max_copies] if row[k] > threshold)])
        return out
    out = []
    for row in x:
        distances = ((row - c) ** 2).sum(1)
        order = np.argsort(distances, kind="stable")[: policy.candidates]
        first = int(order[0])
        if policy.name == "top1" or len(order) == 1:
            out.append([first])
            continue
        residual = row - c[first]
        loss = {}
        for k in order[1:]:
            other = row - c[k]
            if policy.name == "soar":
                loss[int(k)] = other @ other + policy.lam * (residual @ other) ** 2 / (residual @ residual)
            elif policy.name == "air":
                loss[int(k)] = other @ other + policy.lam * residual @ other
            else:
                loss[int(k)] = other @ other
        second = min(loss, key=lambda k: loss[k])
        gated = loss[second] < (1 + policy.gate) * (residual @ residual)
        out.append([first, second] if gated else [first])
    return out


def brute_search(
    x: np.ndarray,
    ids: np.ndarray,
    lists: list[np.ndarray],
    queries: np.ndarray,
    centroids: np.ndarray,
    probes: int,
    k: int,
) -> list[list[int]]:
    """The k nearest members of the nearest lists, each once; ``lists`` hold row numbers."""
    out = []
    for query in queries.astype(np.float64):
        nearest = np.argsort(((query - centroids) ** 2).sum(1), kind="stable")[:probes]
        members = np.unique(np.concatenate([lists[i] for i in nearest]))
        distances = ((x[members].astype(np.float64) - query) ** 2).sum(1)
        out.append([int(ids[row]) for row in members[np.argsort(distances, kind="stable")[:k]]])
    return out
