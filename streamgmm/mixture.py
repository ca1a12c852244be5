"""A Gaussian mixture's parameters, as one frozen record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamgmm.errors import DamagedFileError, RequestError
from streamgmm.storage import load_tensors, save_tensors
from streamgmm.transforms import PREFIX, Transformation, transformation_of_model

Float64Array = NDArray[np.float64]

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


def covariance_shape(covariance_type: str, n_components: int, n_features: int) -> tuple[int, ...]:
    """Shape of ``covariances`` for each type, as in scikit-learn."""
    return {
        "full": (n_components, n_features, n_features),
        "tied": (n_features, n_features),
        "diag": (n_components, n_features),
        "spherical": (n_components,),
    }[covariance_type]


def n_parameters(covariance_type: str, n_components: int, n_features: int) -> int:
    """Free parameters of a mixture."""
    k, d = n_components, n_features
    free = {"full": k * d * (d + 1) // 2, "tied": d * (d + 1) // 2, "diag": k * d, "spherical": k}
    return free[covariance_type] + k * d + k - 1


@dataclass(frozen=True, eq=False)
class Mixture:
    """Parameters of a Gaussian mixture, in the data's own units, fp64.

    Parameters
    ----------
    weights : (K,) array
        Non-negative, summing to one.
    means : (K, D) array
    covariances : array
        ``full`` (K, D, D), ``tied`` (D, D), ``diag`` (K, D), ``spherical`` (K,), as in scikit-learn.
    covariance_type : {'full', 'tied', 'diag', 'spherical'}

    Raises
    ------
    RequestError
        Shapes disagree, or a value is not finite.
    """

    weights: Float64Array
    means: Float64Array
    covariances: Float64Array
    covariance_type: str

    def __post_init__(self) -> None:
        if self.covariance_type not in COVARIANCE_TYPES:
            raise RequestError(
                f"covariance_type must be one of {', '.join(COVARIANCE_TYPES)}; got {self.covariance_type!r}"
            )
        for name in ("weights", "means", "covariances"):
            array = np.array(getattr(self, name), dtype=np.float64, order="C")
            if not np.isfinite(array).all():
                raise RequestError(f"{name} must be finite; it holds NaN or infinity")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.means.ndim != 2:
            raise RequestError(f"means must have shape (K, D); got {self.means.shape}")
        expected = {
            "weights": (self.n_components,),
            "covariances": covariance_shape(self.covariance_type, self.n_components, self.n_features),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise RequestError(f"{name} must have shape {shape}; got {getattr(self, name).shape}")

    @property
    def n_components(self) -> int:
        return int(self.means.shape[0])

    @property
    def n_features(self) -> int:
        return int(self.means.shape[1])

    @property
    def n_parameters(self) -> int:
        """Free parameters, for AIC and BIC."""
        return n_parameters(self.covariance_type, self.n_components, self.n_features)

    @property
    def effective_components(self) -> float:
        """exp of the weights' entropy: K for equal weights, 1 where one component has everything."""
        weights = self.weights[self.weights > 0]
        return float(np.exp(-(weights * np.log(weights)).sum()))

    @cached_property
    def precisions_cholesky(self) -> Float64Array:
        """Upper-triangular U with U Uᵀ = Σ⁻¹ (full, tied), or 1/σ (diag, spherical), as in scikit-learn.

        Raises
        ------
        RequestError
            A covariance is not positive definite.
        """
        if self.covariance_type in ("diag", "spherical"):
            if not (self.covariances > 0).all():
                raise RequestError("covariances must be positive; raise reg_covar")
            return np.asarray(1.0 / np.sqrt(self.covariances))
        try:
            lower = np.linalg.cholesky(self.covariances)
        except np.linalg.LinAlgError:
            raise RequestError("covariances must be positive definite; raise reg_covar") from None
        identity = np.broadcast_to(np.eye(self.n_features), lower.shape)
        return np.ascontiguousarray(np.swapaxes(np.linalg.solve(lower, identity), -1, -2))

    @cached_property
    def precisions(self) -> Float64Array:
        """Inverse covariances, in the shape of ``covariances``."""
        chol = self.precisions_cholesky
        if self.covariance_type in ("diag", "spherical"):
            return np.asarray(chol**2)
        return np.asarray(chol @ np.swapaxes(chol, -1, -2))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over weights‖means‖covariances, C order, little-endian fp64."""
        digest = hashlib.sha256()
        for array in (self.weights, self.means, self.covariances):
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return digest.hexdigest()

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The parameter arrays by name, for storage."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("weights", "means", "covariances")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], covariance_type: str, prefix: str = "") -> Mixture:
        """The inverse of `tensors`."""
        return cls(
            weights=tensors[f"{prefix}weights"],
            means=tensors[f"{prefix}means"],
            covariances=tensors[f"{prefix}covariances"],
            covariance_type=covariance_type,
        )

    def save(self, path: str | Path, transformation: Transformation | None = None, **details: object) -> None:
        """Write a checksummed safetensors file.

        ``details`` (JSON values) are kept in its metadata; ``transformation`` is what was done to raw vectors to make
        the rows that the mixture describes.
        """
        metadata = {
            **details,
            "format": "streamgmm-model",
            "version": 1,
            "covariance_type": self.covariance_type,
            "digest": self.digest,
        }
        if transformation is None:
            save_tensors(Path(path), self.tensors(), metadata)
        else:
            tensors = {**self.tensors(), **transformation.tensors(PREFIX)}
            save_tensors(Path(path), tensors, {**metadata, "transformation": transformation.facts})

    @classmethod
    def load(cls, path: str | Path) -> Mixture:
        """Read a model file, or the model of a RUN folder, after verifying its checksum.

        Raises
        ------
        DataError
            There is no such file.
        DamagedFileError
            The file is not a whole model.
        """
        return load_model(path)[0]


def load_model(path: str | Path) -> tuple[Mixture, dict[str, object]]:
    """The mixture at ``path`` (a model file or a RUN folder) and the metadata stored with it."""
    file, tensors, metadata = _load(path)
    try:
        mixture = Mixture.from_tensors(tensors, str(metadata["covariance_type"]))
    except (KeyError, RequestError) as error:
        raise DamagedFileError(f"{file}: not a usable model ({error}); restore it from a copy") from None
    return mixture, metadata


def load_transformation(path: str | Path) -> Transformation | None:
    """What was done to raw vectors before the model at ``path`` was fitted; None where it was fitted on raw ones.

    Raises as `Mixture.load`.
    """
    file, tensors, metadata = _load(path)
    return transformation_of_model(file, metadata, tensors)


def _load(path: str | Path) -> tuple[Path, dict[str, np.ndarray], dict[str, object]]:
    """The file of a model, and what it holds."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    tensors, metadata = load_tensors(file)
    if metadata.get("format") != "streamgmm-model":
        held = str(metadata.get("format"))[:40]
        raise DamagedFileError(f"{file}: holds {held!r}, not a streamgmm model; name a model or a RUN")
    return file, tensors, metadata
