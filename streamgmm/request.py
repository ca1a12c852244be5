"""What a user can ask of a fit, and whether it can be met."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from streamgmm.errors import RequestError
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS
from streamgmm.mixture import COVARIANCE_TYPES, covariance_shape
from streamgmm.seeding import INIT_METHODS, Start

_FORMAT = 1
"""Raised when the bits of a result change: a run of another format cannot be resumed."""


@dataclass(frozen=True, eq=False)
class FitRequest:
    """Everything a user can ask of a fit. Defaults are those of scikit-learn where it has the parameter.

    Attributes that change the result: n_components, covariance_type, tol, reg_covar, max_iter, max_passes, n_init,
    init, start, seed, precision, device. The others change only speed and memory.
    """

    n_components: int
    covariance_type: str = "full"
    tol: float = 1e-3
    reg_covar: float = 1e-6
    max_iter: int = 100
    max_passes: float = float("inf")
    n_init: int = 1
    init: str = "kmeans"
    start: Start = field(default_factory=Start)
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    memory_limit: int | None = None
    chunk_rows: int | None = None
    threads: int = 4
    checkpoint_every: float = 60.0


def validate(request: FitRequest, source: Source) -> None:
    """Raise RequestError, naming parameter, value and remedy, for what no fit of ``source`` can meet."""
    n, d = source.shape
    k = request.n_components
    if k < 1:
        raise RequestError(f"n_components must be at least 1; got {k}")
    if k > n:
        raise RequestError(f"n_components is {k} and {source.name} has only {n} rows; ask for at most {n} components")
    if request.covariance_type not in COVARIANCE_TYPES:
        raise RequestError(
            f"covariance_type must be one of {', '.join(COVARIANCE_TYPES)}; got {request.covariance_type!r}"
        )
    if request.init not in INIT_METHODS:
        raise RequestError(f"init must be one of {', '.join(INIT_METHODS)}; got {request.init!r}")
    if request.precision not in ("auto", *PRECISIONS):
        raise RequestError(f"precision must be auto or one of {', '.join(PRECISIONS)}; got {request.precision!r}")
    least_values = {"tol": 0, "max_iter": 0, "max_passes": 0, "n_init": 1, "threads": 1, "checkpoint_every": 0}
    for name, least in least_values.items():
        if not getattr(request, name) >= least:
            raise RequestError(f"{name} must be at least {least}; got {getattr(request, name)}")
    if not 0 <= request.reg_covar < float("inf"):
        raise RequestError(f"reg_covar must be at least 0 and finite; got {request.reg_covar}")
    if request.chunk_rows is not None and request.chunk_rows < 1:
        raise RequestError(f"chunk_rows must be at least 1; got {request.chunk_rows}")
    shapes = {
        "weights": (k,),
        "means": (k, d),
        "precisions": covariance_shape(request.covariance_type, k, d),
    }
    for name, shape in shapes.items():
        given = getattr(request.start, name)
        if given is not None and np.shape(given) != shape:
            raise RequestError(f"{name}_init must have shape {shape}; got {np.shape(given)}")


def identity_of(request: FitRequest, source: Source, device: torch.device) -> dict[str, object]:
    """What a run's result depends on: must be equal for it to be resumed."""
    start = {
        name: None if value is None else np.asarray(value, dtype=np.float64).tolist()
        for name, value in asdict(request.start).items()
    }
    return {
        "format": _FORMAT,
        "fingerprint": source.fingerprint,
        "shape": list(source.shape),
        "device": device.type,
        "start": start,
        **{
            name: getattr(request, name)
            for name in ("n_components", "covariance_type", "tol", "reg_covar", "n_init", "init", "seed", "precision")
        },
        "max_iter": request.max_iter,
        "max_passes": None if request.max_passes == float("inf") else request.max_passes,
    }
