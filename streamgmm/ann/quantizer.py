"""The coarse quantizer: centroids, and the mixture they are the means of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.postings import is_postings
from streamgmm.errors import DataError, RequestError, RunError
from streamgmm.io.bfloat16 import values
from streamgmm.io.sources import open_source
from streamgmm.mixture import Mixture, covariance_shape

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Attributes
    ----------
    centroids : (K, D) float32 array
        One a list.
    mixture : Mixture
        Whose means they are. Centroids from a file have equal weights and one variance, and no responsibilities that
        mean anything: ``has_responsibilities`` is false.
    """

    centroids: Float32Array
    mixture: Mixture
    has_responsibilities: bool = True

    @property
    def n_lists(self) -> int:
        return len(self.centroids)

    @property
    def n_features(self) -> int:
        return int(self.centroids.shape[1])

    @property
    def digest(self) -> str:
        """Of the mixture: the same quantizer has the same one."""
        return self.mixture.digest

    def check_features(self, name: str, n_features: int) -> None:
        """Raise RequestError unless rows of ``n_features`` can be compared with the centroids."""
        if n_features != self.n_features:
            raise RequestError(
                f"{name} has {n_features} features and the centroids {self.n_features}; give matching data"
            )


def quantizer_of(model: Any) -> Quantizer:
    """The quantizer that ``model`` is or holds.

    Parameters
    ----------
    model : Quantizer, Mixture, fitted estimator, array (K, D), or path
        Of a k-means, ours or scikit-learn's, the ``cluster_centers_``, which have no responsibilities.
        A path is a RUN, a model file, posting lists, or a file of centroids in any format that `open_source` reads.

    Raises
    ------
    DataError, DamagedFileError, RunError
        There is no such model or file, it is damaged, or its run is unfinished.
    RequestError
        Centroids are not finite.
    """
    if isinstance(model, Quantizer):
        return model
    if isinstance(model, Mixture):
        return _of_mixture(model)
    fitted = getattr(model, "mixture_", None)
    if isinstance(fitted, Mixture):
        return _of_mixture(fitted)
    model = getattr(model, "cluster_centers_", model)
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.suffix == ".safetensors" or (path / "model.safetensors").exists():
            return _of_mixture(Mixture.load(path))
        if (path / "config.json").exists() and (path / "checkpoints").exists():
            raise RunError(
                f"{path}: is unfinished, so it has no model yet; run its fit again, and it goes on to the end"
            )
        if is_postings(path):
            return quantizer_of(path / "centroids.npy")
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give a RUN, a model file, or a file of centroids")
    source = open_source(str(model) if isinstance(model, Path) else model)
    return quantizer_of_centroids(np.asarray(values(source.read(0, source.shape[0])), dtype=np.float64))


def quantizer_of_centroids(centroids: NDArray[Any]) -> Quantizer:
    """Centroids (K, D) alone: every list weighs the same, so the most probable list is the nearest."""
    if not np.isfinite(centroids).all():
        row = int(np.flatnonzero(~np.isfinite(centroids).all(1))[0])
        raise RequestError(f"centroids must be finite; row {row} holds NaN or infinity")
    k = len(centroids)
    scale = float(np.var(centroids, axis=0).mean()) or 1.0
    mixture = Mixture(np.full(k, 1 / k), centroids, np.full(k, scale), "spherical")
    return Quantizer(_narrow(mixture.means), mixture, has_responsibilities=False)


def _of_mixture(mixture: Mixture) -> Quantizer:
    return Quantizer(_narrow(mixture.means), mixture)


def _narrow(means: NDArray[np.float64]) -> Float32Array:
    with np.errstate(over="ignore"):
        centroids = means.astype(np.float32)
    if not np.isfinite(centroids).all():
        raise RequestError(f"centroids must fit float32; the largest is {np.abs(means).max():.3g}; scale the data")
    return centroids


def tempered(mixture: Mixture, temperature: float) -> Mixture:
    """The mixture whose log joint densities are 1/``temperature`` of ``mixture``'s, up to a common constant.

    Responsibilities r become proportional to r^(1/T): softer above 1, and one-hot as T goes to 0. Each covariance is
    multiplied by T, and each weight becomes w^(1/T) |Σ|^(½ − 1/(2T)), normalised.

    Raises
    ------
    RequestError
        ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise RequestError(f"temperature must be positive; got {temperature}")
    if temperature == 1:
        return mixture
    k, d, kind = mixture.n_components, mixture.n_features, mixture.covariance_type
    assert mixture.covariances.shape == covariance_shape(kind, k, d)
    if kind == "tied":
        log_det = np.zeros(k)
    elif kind == "full":
        log_det = np.linalg.slogdet(mixture.covariances)[1]
    else:
        log_det = np.log(mixture.covariances).reshape(k, -1).sum(1) * (d if kind == "spherical" else 1)
    with np.errstate(divide="ignore"):
        log_weights = np.log(mixture.weights) / temperature + log_det * (0.5 - 0.5 / temperature)
    weights = np.exp(log_weights - log_weights.max())
    return replace(mixture, weights=weights / weights.sum(), covariances=mixture.covariances * temperature)
