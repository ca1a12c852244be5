"""What a user can ask of a fit, and whether it can be met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from streamgmm.errors import RequestError
from streamgmm.io.readers import reader_threads
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS
from streamgmm.mixture import COVARIANCE_TYPES, covariance_shape
from streamgmm.passes import STEPWISE_PASSES
from streamgmm.seeding import INIT_METHODS, STREAMED, Start
from streamgmm.steps.collapse import POLICIES

_FORMAT = 1
"""Raised when the bits of a result change: a run of another format cannot be resumed."""


@dataclass(frozen=True, eq=False)
class FitRequest:
    """Everything a user can ask of a fit. Defaults are those of scikit-learn where it has the parameter.

    ``memory_limit``, ``host_memory``, ``chunk_rows``, ``threads``, ``checkpoint_every`` and ``recheck`` change only
    speed and memory; ``criterion`` only which of several sizes is called the best. The others change the result.

    Attributes
    ----------
    n_components : int or sequence of int
        Several sizes are trained side by side on the same passes.
    model : {'gmm', 'kmeans'}
        ``kmeans`` assigns each row to the nearest centre; the model is then spherical, with equal weights.
    weights : Source or None
        Sample weights, (N, 1).
    holdout : float
        Fraction of the rows kept out of training, on which the models are scored at the end.
    nonfinite : {'raise', 'skip'}
        What to do about rows that hold NaN or infinity.
    collapse : {'floor', 'reseed', 'split', 'drop'}
        What to do about components that own no row; `steps.collapse` has the list.
    split_to : int or None
        Grow to so many components by splitting the heaviest whenever the mixture has converged.
    recheck : bool
        Whether rows that are read again are compared with the first pass, wherever they are not in memory.
    algorithm : {'em', 'stepwise', 'auto'}
        ``stepwise`` grows the mixture on the sample and then updates it fifty times a pass; `algorithm` has the choice
        that ``auto`` makes. Without ``max_passes`` it ends after four passes of training.
    init : {'kmeans', 'k-means++', 'random', 'random_from_data', 'k-means||'}
        The last draws from every row, in three passes; the others from the sample.
    accelerate : {'none', 'squarem'}
        Extrapolate full-batch EM after every second update; a step that does harm is undone (`steps.squarem`).
    sample_rows : int or None
        Of the sample that the first mixture is made from; None leaves it to `algorithm.sampled_rows`, a function of
        the data's shape and of what is asked for. It never follows from the memory there is: that must not change a
        result.
    criterion : {'auto', 'bic', 'aic', 'held_out'}
        By which the best of several sizes is chosen; ``auto`` is ``held_out`` where rows are held out, else ``bic``.
    """

    n_components: int | Sequence[int]
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
    host_memory: int | None = None
    chunk_rows: int | None = None
    threads: int = field(default_factory=reader_threads)
    checkpoint_every: float = 60.0
    recheck: bool = True
    model: str = "gmm"
    weights: Source | None = None
    holdout: float = 0.0
    nonfinite: str = "raise"
    collapse: str = "floor"
    split_to: int | None = None
    criterion: str = "auto"
    algorithm: str = "em"
    sample_rows: int | None = None
    accelerate: str = "none"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of components asked for."""
        given = self.n_components
        return tuple(int(k) for k in given) if isinstance(given, Sequence) else (int(given),)

    @property
    def draws_seeds(self) -> bool:
        """Whether the seeds come from passes over every row."""
        return self.init == STREAMED and self.start.means is None

    @property
    def hard(self) -> bool:
        return self.model == "kmeans"

    def iterations(self, algorithm: str) -> int:
        """Full-batch updates and stepwise passes that ``algorithm`` (em or stepwise) may make."""
        unlimited = self.max_passes == float("inf")
        return min(self.max_iter, STEPWISE_PASSES + 1) if algorithm == "stepwise" and unlimited else self.max_iter

    @property
    def chosen_by(self) -> str:
        """``criterion``, resolved."""
        if self.criterion != "auto":
            return self.criterion
        return "held_out" if self.holdout else "bic"


def validate(request: FitRequest, source: Source) -> None:
    """Raise RequestError, naming parameter, value and remedy, for what no fit of ``source`` can meet."""
    n, d = source.shape
    if not request.sizes:
        raise RequestError("n_components names no number of components; give at least one")
    if len(set(request.sizes)) < len(request.sizes):
        raise RequestError(f"n_components must name each number once; got {request.sizes}")
    for k in (*request.sizes, *([] if request.split_to is None else [request.split_to])):
        if k < 1:
            raise RequestError(f"n_components must be at least 1; got {k}")
        if k > n:
            raise RequestError(
                f"n_components is {k} and {source.name} has only {n} rows; ask for at most {n} components"
            )
    _validate_choices(request)
    if request.algorithm == "stepwise" and (obstacle := not_stepwise(request)):
        raise RequestError(f"algorithm 'stepwise' {obstacle}, or algorithm='em'")
    if request.covariance_type not in COVARIANCE_TYPES:
        raise RequestError(
            f"covariance_type must be one of {', '.join(COVARIANCE_TYPES)}; got {request.covariance_type!r}"
        )
    if request.init not in (*INIT_METHODS, STREAMED):
        raise RequestError(f"init must be one of {', '.join((*INIT_METHODS, STREAMED))}; got {request.init!r}")
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
    if request.sample_rows is not None and request.sample_rows < max(request.sizes):
        raise RequestError(
            f"sample_rows must be at least n_components, {max(request.sizes)}; got {request.sample_rows}; "
            "a hundred a component are a good start"
        )
    if len(request.sizes) > 1 and any(value is not None for value in vars(request.start).values()):
        raise RequestError("starting parameters belong to one number of components; give a single n_components")
    k = request.sizes[0]
    shapes = {
        "weights": (k,),
        "means": (k, d),
        "precisions": covariance_shape(request.covariance_type, k, d),
    }
    for name, shape in shapes.items():
        given = getattr(request.start, name)
        if given is not None and np.shape(given) != shape:
            raise RequestError(f"{name}_init must have shape {shape}; got {np.shape(given)}")


def not_stepwise(request: FitRequest) -> str:
    """Why a request cannot be met by stepwise EM, and with what it could be; empty where it can."""
    if request.hard:
        return "is for Gaussian mixtures; use model='gmm'"
    if len(request.sizes) > 1:
        return f"trains one size at a time, not n_components={request.sizes}; give a single one"
    if request.n_init > 1:
        return f"makes one start, grown on the sample, not n_init={request.n_init}; use n_init=1"
    if request.split_to is not None:
        return f"grows the mixture itself, not by split_to={request.split_to}; give n_components alone"
    if request.collapse == "drop":
        return "keeps every component, so it has no collapse='drop'; use another policy"
    if request.init == STREAMED:
        return f"grows the mixture from a few seeds, for which init={STREAMED!r} reads too much; use init='kmeans'"
    return ""


_CHOICES = {
    "algorithm": ("em", "stepwise", "auto"),
    "accelerate": ("none", "squarem"),
    "model": ("gmm", "kmeans"),
    "nonfinite": ("raise", "skip"),
    "collapse": POLICIES,
    "criterion": ("auto", "bic", "aic", "held_out"),
}


def _validate_choices(request: FitRequest) -> None:
    for name, choices in _CHOICES.items():
        if getattr(request, name) not in choices:
            raise RequestError(f"{name} must be one of {', '.join(choices)}; got {getattr(request, name)!r}")
    if not 0 <= request.holdout < 1:
        raise RequestError(f"holdout must be a fraction, at least 0 and below 1; got {request.holdout}")
    if request.criterion == "held_out" and not request.holdout:
        raise RequestError("criterion 'held_out' needs rows that are held out; set holdout, such as 0.05")
    if request.split_to is not None:
        if request.hard or len(request.sizes) > 1:
            raise RequestError("split_to grows one Gaussian mixture; give a single n_components and model='gmm'")
        if request.split_to < request.sizes[0]:
            raise RequestError(f"split_to must be at least n_components, {request.sizes[0]}; got {request.split_to}")
    if request.hard and request.accelerate != "none":
        raise RequestError(f"accelerate {request.accelerate!r} is for Gaussian mixtures; use model='gmm', or 'none'")
    if request.hard and request.covariance_type != "spherical":
        raise RequestError(f"model 'kmeans' is spherical; got covariance_type {request.covariance_type!r}")


def identity_of(request: FitRequest, source: Source, device: torch.device) -> dict[str, object]:
    """What a run's result depends on: must be equal for it to be resumed."""
    start = {
        name: None if value is None else np.asarray(value, dtype=np.float64).tolist()
        for name, value in asdict(request.start).items()
    }
    # Later settings are named only where they differ from what runs did before there were any.
    later = ("model", "holdout", "nonfinite", "collapse", "split_to", "algorithm", "sample_rows", "accelerate")
    extra = {name: getattr(request, name) for name in later if getattr(request, name) != getattr(FitRequest, name)}
    if request.weights is not None:
        extra["weights"] = request.weights.fingerprint
    return {
        "format": _FORMAT,
        "fingerprint": source.fingerprint,
        "shape": list(source.shape),
        "device": device.type,
        "start": start,
        **{
            name: getattr(request, name)
            for name in ("covariance_type", "tol", "reg_covar", "n_init", "init", "seed", "precision")
        },
        "n_components": request.sizes[0] if len(request.sizes) == 1 else list(request.sizes),
        **extra,
        "max_iter": request.max_iter,
        "max_passes": None if request.max_passes == float("inf") else request.max_passes,
    }
