"""``weights_init``, ``means_init`` and ``precisions_init``: what is given must be usable, in scikit-learn's words."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import check_array

from streamgmm.errors import RequestError
from streamgmm.mixture import covariance_shape
from streamgmm.seeding import Start


def checked_start(weights: Any, means: Any, precisions: Any, kind: str, n_components: int, n_features: int) -> Start:
    """The given parameters, fp64 or fp32 as they are, None where none were given.

    Raises
    ------
    RequestError (a ValueError)
        Another shape, weights that are no distribution, or precisions that are not positive (definite).
    """
    shape = covariance_shape(kind, n_components, n_features)
    return Start(
        None if weights is None else _weights(_array(weights, "weights", (n_components,))),
        None if means is None else _array(means, "means", (n_components, n_features)),
        None if precisions is None else _precisions(_array(precisions, f"{kind} precision", shape), kind),
    )


def _array(given: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = check_array(
        given, dtype=[np.float64, np.float32], ensure_2d=False, allow_nd=True, input_name=name, ensure_min_samples=0
    )
    if array.shape != shape:
        raise RequestError(f"The parameter '{name}' should have the shape of {shape}, but got {array.shape}")
    return np.asarray(array)


def _weights(weights: np.ndarray) -> np.ndarray:
    low, high = weights.min(), weights.max()
    if low < 0 or high > 1:
        raise RequestError(
            f"The parameter 'weights' should be in the range [0, 1], but got max value {high:.5f}, min value {low:.5f}"
        )
    total = weights.sum()
    if abs(1 - total) > (1e-6 if weights.dtype == np.float32 else 1e-8):
        raise RequestError(f"The parameter 'weights' should be normalized, but got sum(weights) = {total:.5f}")
    return weights


def _precisions(precisions: np.ndarray, kind: str) -> np.ndarray:
    if kind in ("diag", "spherical"):
        if not (precisions > 0).all():
            raise RequestError(f"'{kind} precision' should be positive")
        return precisions
    symmetric = np.allclose(precisions, np.swapaxes(precisions, -1, -2))
    if not (symmetric and (np.linalg.eigvalsh(precisions) > 0).all()):
        raise RequestError(f"'{kind} precision' should be symmetric, positive-definite")
    return precisions
