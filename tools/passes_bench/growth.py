"""A mixture grown on the sample by splitting components: a better optimum than k-means leads to, and no row read."""

from __future__ import annotations

import numpy as np
import torch

from passes_bench.engine import Engine
from streamgmm.estep import bind
from streamgmm.frame import Frame
from streamgmm.mixture import Mixture
from streamgmm.steps.growth import first_size
from streamgmm.steps.split import split_heaviest

_ITERATIONS_A_ROUND = 5
_LAST_ITERATIONS = 25
_LOCAL_ITERATIONS = 8
_SMALLEST_HALF = 5
_PRIOR_ROWS = 4


def grown(engine: Engine, n_components: int, seed: int, by_gain: bool = True) -> Mixture:
    """From K/16 components seeded by k-means: half of them are split, then five EM iterations, until there are K.

    Thirty iterations end it where the sample has a row a parameter, and five where it has fewer and more would overfit.
    ``by_gain`` splits where two components fit better (diag alone), else the heaviest split.
    """
    mixture = engine.em(engine.seeded(first_size(n_components), seed), engine.sample, _ITERATIONS_A_ROUND)
    while (k := mixture.n_components) < n_components:
        count = min(max(1, k // 2), n_components - k)
        mixture = (
            split_best(mixture, engine.sample, count, seed)
            if by_gain and mixture.covariance_type == "diag"
            else split_heaviest(mixture, count)
        )
        mixture = engine.em(mixture, engine.sample, _ITERATIONS_A_ROUND)
    enough = len(engine.sample) >= mixture.n_parameters
    return engine.em(mixture, engine.sample, _LAST_ITERATIONS) if enough else mixture


def split_best(mixture: Mixture, rows: torch.Tensor, count: int, seed: int) -> Mixture:
    """``mixture`` (diag) with the ``count`` components that gain most by it split; the second halves come last."""
    d = mixture.n_features
    bound = bind(mixture, Frame(np.zeros(d), np.ones(d)), "high", torch.device("cpu"), 1)
    labels = np.concatenate(
        list(bound.kernel.map_joint(lambda joint: joint.argmax(0).numpy().copy(), rows, bound.parameters))
    )
    gain, (shares, centres, spreads) = split_gains(mixture, rows.double().numpy(), labels, seed)
    chosen = np.lexsort((-mixture.weights, -gain))[:count]
    weights, means, covariances = (np.array(a) for a in (mixture.weights, mixture.means, mixture.covariances))
    weights[chosen] *= shares[chosen, 0]
    means[chosen], covariances[chosen] = centres[chosen, 0], spreads[chosen, 0]
    weights = np.concatenate([weights, mixture.weights[chosen] * shares[chosen, 1]])
    means = np.concatenate([means, centres[chosen, 1]])
    return Mixture(weights / weights.sum(), means, np.concatenate([covariances, spreads[chosen, 1]]), "diag")


Halves = tuple[np.ndarray, np.ndarray, np.ndarray]


def split_gains(mixture: Mixture, rows: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, Halves]:
    """What two components instead of one would gain on the rows of each, and their parameters.

    Every component has a local EM of its own over the rows whose most likely component it is, all at once, from halves
    on either side of its mean along its rows' leading axis. Variances are drawn towards the component's as if by four
    more rows, so that a handful of rows does not look like a gain.

    Returns
    -------
    gain : (K,) array
        Nats, summed over the rows; −inf where a half would own fewer than five.
    halves : tuple
        Shares (K, 2), means (K, 2, D) and variances (K, 2, D).
    """
    k = mixture.n_components
    order = np.argsort(labels, kind="stable")
    x, own = rows[order], labels[order]
    edges = np.searchsorted(own, np.arange(k + 1))
    size = np.maximum(np.diff(edges), 1)
    variances = np.array(mixture.covariances)
    offset = (
        0.7 * np.sqrt(variances) * _leading_axes((x - mixture.means[own]) / np.sqrt(variances[own]), own, edges, seed)
    )
    shares = np.full((k, 2), 0.5)
    centres = np.stack([mixture.means - offset, mixture.means + offset], 1)
    spreads = np.stack([variances, variances], 1)
    start = shares.copy(), centres.copy(), spreads.copy()
    both = np.zeros(len(x))
    for _ in range(_LOCAL_ITERATIONS):
        joint = [np.log(shares[own, i]) + _log_density(x, centres[own, i], spreads[own, i]) for i in (0, 1)]
        both = np.logaddexp(*joint)
        for i in (0, 1):
            resp = np.exp(joint[i] - both)[:, None]
            counts = np.maximum(_sums(resp, edges), 1e-6)
            centres[:, i] = _sums(resp * x, edges) / counts
            scatter = _sums(resp * (x - centres[own, i]) ** 2, edges)
            spreads[:, i] = (scatter + _PRIOR_ROWS * variances) / (counts + _PRIOR_ROWS)
            shares[:, i] = np.clip(counts[:, 0] / size, 1e-3, 1 - 1e-3)
        shares /= shares.sum(1, keepdims=True)
    single = _log_density(x, mixture.means[own], variances[own])
    gain = _sums((both - single)[:, None], edges)[:, 0]
    small = shares.min(1) * np.diff(edges) < _SMALLEST_HALF
    gain[small] = -np.inf
    for ended, begun in zip((shares, centres, spreads), start, strict=True):
        ended[small] = begun[small]
    return gain, (shares, centres, spreads)


def _leading_axes(whitened: np.ndarray, own: np.ndarray, edges: np.ndarray, seed: int) -> np.ndarray:
    """(K, D) unit vectors: four power iterations on each component's rows."""
    axes = np.random.default_rng(seed).normal(size=(len(edges) - 1, whitened.shape[1]))
    for _ in range(4):
        axes = _sums(whitened * (whitened * axes[own]).sum(1, keepdims=True), edges) + 1e-12
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    return axes


def _sums(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Sums of rows (n, D) between ``edges`` (K+1,), (K, D)."""
    sums = np.add.reduceat(values, np.minimum(edges[:-1], len(values) - 1))
    sums[edges[1:] == edges[:-1]] = 0.0  # where reduceat gives a row that is not theirs
    return np.asarray(sums)


def _log_density(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    energy = ((x - mean) ** 2 / variance).sum(1) + np.log(variance).sum(1)
    return np.asarray(-0.5 * (energy + x.shape[1] * np.log(2 * np.pi)))
