"""Rows drawn from a mixture: any number of them, a piece at a time, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from streamgmm.errors import RequestError
from streamgmm.mixture import Float64Array, Mixture
from streamgmm.parallel import map_in_order
from streamgmm.statistics import BLOCK_ROWS

_PIECE_VALUES = 1 << 22


def draw(mixture: Mixture, n_samples: int, seed: int, workers: int = 1) -> Iterator[tuple[Float64Array, np.ndarray]]:
    """Independent rows of ``mixture`` in pieces: (n, D) fp64, and the component of each, (n,) int32.

    A piece has 65,536 rows, or as many fewer as 32 MiB hold, by D alone, and random numbers of its own: ``workers``
    change no bit. At most ``workers`` + 1 pieces are held at once.

    Raises
    ------
    RequestError
        ``n_samples`` or ``seed`` is negative or zero rows are asked for, or a covariance is not positive definite.
    """
    if n_samples < 1:
        raise RequestError(f"n_samples must be at least 1; got {n_samples}")
    if seed < 0:
        raise RequestError(f"seed must be at least 0; got {seed}")
    factors = factors_of(mixture)
    cumulative = np.cumsum(mixture.weights)
    cumulative /= cumulative[-1]
    rows = piece_rows(mixture.n_features)

    def piece(number: int) -> tuple[Float64Array, np.ndarray]:
        count = min(rows, n_samples - number * rows)
        # Streams of their own: a shorter piece begins as a longer one does.
        choice, noise = (_generator(seed, number, i) for i in range(2))
        labels = np.searchsorted(cumulative, choice.random(count), side="right").astype(np.int32)
        return _rows(mixture, factors, labels, noise.standard_normal((count, mixture.n_features))), labels

    yield from map_in_order(piece, range(-(-n_samples // rows)), workers)


def _generator(seed: int, piece: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(piece, stream)))


def piece_rows(n_features: int) -> int:
    """Rows drawn at once: 65,536, halved until they take no more than 32 MiB."""
    rows = BLOCK_ROWS
    while rows > 1 and rows * n_features > _PIECE_VALUES:
        rows //= 2
    return rows


def factors_of(mixture: Mixture) -> Float64Array:
    """What turns unit noise into each component's: lower Cholesky factors (full, tied), or standard deviations.

    Raises
    ------
    RequestError
        A covariance is not positive definite, or a variance is negative.
    """
    if mixture.covariance_type in ("diag", "spherical"):
        if not (mixture.covariances >= 0).all():
            raise RequestError("covariances must not be negative; raise reg_covar and fit again")
        return np.asarray(np.sqrt(mixture.covariances))
    try:
        return np.asarray(np.linalg.cholesky(mixture.covariances), dtype=np.float64)
    except np.linalg.LinAlgError:
        raise RequestError("covariances must be positive definite; raise reg_covar and fit again") from None


def _rows(mixture: Mixture, factors: Float64Array, labels: np.ndarray, noise: Float64Array) -> Float64Array:
    """μ_k + L_k z for each row's component k; overwrites ``noise``."""
    kind = mixture.covariance_type
    if kind == "tied":
        noise = _correlated(noise, factors)
    elif kind == "full":
        # Rows of a component together: one product each, and no (n, D, D).
        order = np.argsort(labels, kind="stable")
        for own in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            noise[own] = _correlated(noise[own], factors[labels[own[0]]])
    else:
        noise *= factors[labels] if kind == "diag" else factors[labels, None]
    noise += mixture.means[labels]
    return noise


def _correlated(noise: Float64Array, factor: Float64Array) -> Float64Array:
    # torch's products keep to one thread in a worker, so that their bits do not depend on what else runs.
    return np.asarray((torch.from_numpy(noise) @ torch.from_numpy(factor).T).numpy(), dtype=np.float64)
