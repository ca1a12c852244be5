"""`GaussianMixture`: scikit-learn's interface over the streamed fit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from streamgmm import inference
from streamgmm.device import resolve_device
from streamgmm.errors import RequestError
from streamgmm.estimator.data import float_dtype, joined, result_dtype, rows_of, weighted_mean, weights_of
from streamgmm.estimator.quantiles import quantile
from streamgmm.estimator.start import checked_start
from streamgmm.estimator.stepwise import batch_statistics, step_size
from streamgmm.estimator.streamed import Streamed
from streamgmm.estimator.verbose import VerboseProgress
from streamgmm.fitting import fit as fit_source
from streamgmm.io.sources.base import Source
from streamgmm.mixture import COVARIANCE_TYPES, Float64Array, Mixture, load_model, load_transformation
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import INIT_METHODS, STREAMED, Start
from streamgmm.steps.candidate import mean_log_likelihood
from streamgmm.steps.stepwise import stepwise_update
from streamgmm.transforms import Transformation
from streamgmm.weighting import Weighting


class GaussianMixture(Streamed, DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Gaussian mixture whose data need not fit in memory.

    Parameters, attributes, signs and messages are scikit-learn's (docs/sklearn.md lists what differs). ``X`` may be an
    array, a data frame, a memory map, a torch tensor, a ``zarr.Array``, a Dask array, a path, a list of paths, or an
    iterator of arrays. The parameters after ``verbose_interval`` are this package's.

    Parameters
    ----------
    n_components : int, default 1
    covariance_type : {'full', 'tied', 'diag', 'spherical'}, default 'full'
    tol : float, default 1e-3
        Converged when the mean log-likelihood changes by less, nats a sample.
    reg_covar : float, default 1e-6
        Added to every variance.
    max_iter : int, default 100
    n_init : int, default 1
        Starts trained side by side on the same passes; the best is kept.
    init_params : {'kmeans', 'k-means++', 'random', 'random_from_data', 'k-means||'}, default 'kmeans'
        On a uniform sample of the rows; ``k-means||`` draws from every row, in three passes, for many components.
    weights_init, means_init, precisions_init : arrays, optional
        (K,), (K, D), and the shape of ``precisions_``.
    random_state : int, RandomState or None
    warm_start : bool, default False
        Start the next ``fit`` from the parameters of the last; ``n_init`` is then ignored.
    verbose : int, default 0
        1 prints every start's fate and every tenth iteration, 2 also times and changes.
    verbose_interval : int, default 10
        Iterations from one line to the next.
    device : {'auto', 'cpu', 'cuda', 'cuda:N'}, default 'auto'
    precision : {'auto', 'medium', 'high', 'highest'}, default 'auto'
        ``highest`` is fp64; ``auto`` takes the fastest that agrees with it on a sample, checked every iteration. On a
        CPU ``auto`` works in fp64 on float64 rows, and on up to 4,096 rows of any type.
    memory_limit : str or int, optional
        Bytes on the device (growth of the process on a CPU), such as ``'4GiB'``.
    chunk_rows : int, optional
        Rows moved at once; rounded to a multiple or a fraction of 65,536. Never changes a result.
    checkpoint : path, optional
        A RUN folder: the fit is saved there as it goes, and resumed from there.
    algorithm : {'em', 'stepwise', 'auto'}, default 'em'
        ``stepwise`` grows the mixture on a sample and updates it fifty times a pass: for data that takes long to read.
        ``auto`` chooses by what the sample shows. ``max_iter`` then counts passes, of which there are at most four.
    sample_rows : int, optional
        Rows of the sample that the first parameters are made from, at least ``n_components``; default: by N, D and K,
        mostly 32,768.
    accelerate : {'none', 'squarem'}, default 'none'
        ``squarem`` extrapolates after every second update; a step that does harm is undone. Fewer passes where
        components overlap, for up to eight mixtures more in memory.

    Attributes
    ----------
    weights_ : (K,)
    means_ : (K, D)
    covariances_, precisions_, precisions_cholesky_ : as in scikit-learn
        Like weights and means float32 where the rows are float32, else float64. What the fit found is kept in fp64
        beside them (`mixture_`) as long as they are not replaced.
    converged_ : bool
    n_iter_ : int
    lower_bound_ : float
    lower_bounds_ : list of float
    n_features_in_ : int
    feature_names_in_ : (D,), where X had names

    Examples
    --------
    >>> import numpy as np
    >>> from streamgmm import GaussianMixture
    >>> X = np.random.default_rng(0).normal(size=(1000, 2)) + [[0, 9]] * np.arange(2).repeat(500)[:, None]
    >>> GaussianMixture(2, random_state=0, device="cpu").fit(X).means_.shape
    (2, 2)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "covariance_type": [StrOptions(set(COVARIANCE_TYPES))],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "reg_covar": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "init_params": [StrOptions({*INIT_METHODS, STREAMED})],
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", None],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "verbose_interval": [Interval(Integral, 1, None, closed="left")],
        **Streamed._stream_constraints,
        "algorithm": [StrOptions({"em", "stepwise", "auto"})],
        "accelerate": [StrOptions({"none", "squarem"})],
    }

    n_iter_: int
    lower_bounds_: list[float]
    _transformation: Transformation | None

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        device: str = "auto",
        precision: str = "auto",
        memory_limit: str | int | None = None,
        chunk_rows: int | None = None,
        checkpoint: str | Path | None = None,
        algorithm: str = "em",
        sample_rows: int | None = None,
        accelerate: str = "none",
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.device = device
        self.precision = precision
        self.memory_limit = memory_limit
        self.chunk_rows = chunk_rows
        self.checkpoint = checkpoint
        self.algorithm = algorithm
        self.sample_rows = sample_rows
        self.accelerate = accelerate

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, client: Any = None) -> GaussianMixture:
        """Estimate the parameters from every row of ``X``; an iterator is read once, into a temporary file.

        Parameters
        ----------
        X : array-like, path, or whatever the class takes
            (N, D).
        y : ignored
        sample_weight : (N,) array or path of a file of N values, optional
            What each row counts: zero is a row left out, two a row that is there twice.
        client : distributed.Client or address of a Dask scheduler, optional
            Fit on its workers, one process each, to the same bits (docs/distributed.md). They must see the files, and
            the ``checkpoint``, under the same paths.

        Raises
        ------
        ValueError
            A parameter or the data cannot be used; the message names it, its value and the remedy.
        """
        with rows_of(self, X, reset=True, ensure_min_samples=2, client=client) as source:
            self._fit(source, sample_weight, client)
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """``fit(X).predict(X)``."""
        with rows_of(self, X, reset=True, ensure_min_samples=2) as source:
            self._fit(source, sample_weight)
            return self._labels(source)

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GaussianMixture:
        """One step of stepwise EM from the rows of ``X``; the first call seeds the components on them.

        With s the statistics a row that the parameters stand for, and ŝ those of ``X``: s ← (1 − γ) s + γ ŝ with
        γ = (n_iter_ + 2)^−0.6 (Cappé & Moulines 2009), and γ = 1 in the first call. After ``fit``, ``n_iter_`` counts
        its iterations, so that what it learnt is kept the better the longer it took. The batches should come in random
        order; ``lower_bounds_`` are theirs. ``tol``, ``max_iter``, ``n_init`` and ``checkpoint`` play no part.
        """
        first = not hasattr(self, "weights_")
        with rows_of(self, X, reset=first) as source:
            weights = weights_of(sample_weight, source)
            if first:
                self._refuse_fewer_rows_than_components(source)
                request = replace(self._request(source, self._given_start(source)), max_iter=0, n_init=1)
                mixture = fit_source(source, replace(request, weights=weights)).mixture
                bounds, gamma, dtype = [], 1.0, float_dtype(source.dtype)
            else:
                mixture, bounds, gamma = self.mixture_, self.lower_bounds_, step_size(self.n_iter_)
                dtype = self.means_.dtype
            device, precision = resolve_device(self.device), self._precision(source)
            batch = batch_statistics(mixture, source, Weighting(weights), precision, device)
        bound = mean_log_likelihood(batch)
        n_iter = 0 if first else self.n_iter_
        self._set(stepwise_update(mixture, batch, gamma, self.reg_covar).mixture, False, [*bounds, bound], dtype)
        self.n_iter_ = n_iter + 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Most responsible component of each row, (N,) int64."""
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            return self._labels(source)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Responsibilities, (N, K). For more rows than memory holds use ``streamgmm predict --proba``."""
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            mixture = self.mixture_
            resp = np.empty((source.shape[0], mixture.n_components), result_dtype(source.dtype, self.means_.dtype))
            return joined(inference.responsibilities(source, mixture, self._inference(source)), resp)

    def score_samples(self, X: Any) -> np.ndarray:
        """log p(x) of each row, (N,), nats."""
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            log_prob = np.empty(source.shape[0], result_dtype(source.dtype, self.means_.dtype))
            return joined(inference.log_likelihoods(source, self.mixture_, self._inference(source)), log_prob)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-likelihood, nats a sample, each row counted as ``fit`` counts it; streamed in bounded memory."""
        return self._score(X, sample_weight)[0]

    def bic(self, X: Any) -> float:
        """Bayesian information criterion; lower is better."""
        score, n = self._score(X)
        return float(-2 * score * n + self._n_parameters() * np.log(n))

    def aic(self, X: Any) -> float:
        """Akaike information criterion; lower is better."""
        score, n = self._score(X)
        return float(-2 * score * n + 2 * self._n_parameters())

    def outlier_threshold(self, X: Any, q: float) -> float:
        """The ``q``-quantile of ``score_samples(X)``: about a share ``q`` of such rows scores less.

        Exact, as `numpy.quantile` interpolates; the rows are read once, in bounded memory. Beyond a million rows the
        scores are kept in an unnamed temporary file meanwhile, eight bytes a row.
        """
        check_is_fitted(self)
        if not 0 <= q <= 1:
            raise RequestError(f"q must be a number between 0 and 1; got {q!r}")
        with rows_of(self, X, reset=False) as source:
            dtype = result_dtype(source.dtype, self.means_.dtype)
            scores = inference.log_likelihoods(source, self.mixture_, self._inference(source))
            return quantile((chunk.astype(dtype) for chunk in scores), source.shape[0], float(q))

    def sample(self, n_samples: int = 1) -> tuple[Float64Array, np.ndarray]:
        """Rows (n, D) drawn from the mixture, and their components (n,)."""
        check_is_fitted(self)
        if n_samples < 1:
            raise RequestError(
                f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample."
            )
        return inference.sample(self.mixture_, n_samples, check_random_state(self.random_state))

    @property
    def mixture_(self) -> Mixture:
        """The fitted parameters as a `Mixture`, in fp64: those of the fit, or what they were replaced by."""
        check_is_fitted(self)
        exact: Mixture | None = getattr(self, "_exact", None)
        if exact is not None and all(
            np.array_equal(getattr(self, f"{name}_"), getattr(exact, name).astype(self.means_.dtype))
            for name in ("weights", "means", "covariances")
        ):
            return exact
        return Mixture(self.weights_, self.means_, self.covariances_, self.covariance_type)

    def save(self, path: str | Path) -> None:
        """Write the fitted mixture, and how its rows were prepared, as a checksummed safetensors file."""
        mixture = self.mixture_
        mixture.save(
            path,
            getattr(self, "_transformation", None),
            result={"converged": self.converged_, "lower_bounds": list(map(float, self.lower_bounds_))},
        )

    @classmethod
    def load(cls, path: str | Path) -> GaussianMixture:
        """A fitted estimator from a file of `save`, or from a RUN folder.

        Raises
        ------
        DataError, DamagedFileError
            There is no such file, or its checksum does not match.
        """
        mixture, metadata = load_model(path)
        estimator = cls(mixture.n_components, covariance_type=mixture.covariance_type)
        facts = metadata.get("result")
        facts = facts if isinstance(facts, dict) else {}
        bounds = list(facts.get("lower_bounds", []))
        estimator._transformation = load_transformation(path)
        estimator._set(mixture, bool(facts.get("converged", False)), bounds, np.dtype(np.float64))
        estimator.n_features_in_ = mixture.n_features
        return estimator

    def to_sklearn(self) -> Any:
        """A ``sklearn.mixture.GaussianMixture`` with the same settings, fitted to the same parameters, if any."""
        from sklearn.mixture import GaussianMixture as Peer

        settings = {name: getattr(self, name) for name in Peer().get_params()}
        if self.init_params == STREAMED:  # of its methods the one that draws likewise
            settings["init_params"] = "k-means++"
        peer = Peer(**settings)
        _copy_fitted(self, peer)
        return peer

    @classmethod
    def from_sklearn(cls, peer: Any, **own: Any) -> GaussianMixture:
        """The inverse of `to_sklearn`; ``own`` are parameters that scikit-learn does not have, such as ``device``."""
        from sklearn.mixture import GaussianMixture as Peer

        if not isinstance(peer, Peer):
            raise RequestError(f"peer must be a sklearn.mixture.GaussianMixture; got {type(peer).__name__}")
        estimator = cls(**peer.get_params(), **own)
        _copy_fitted(peer, estimator)
        return estimator

    def _fit(self, source: Source, sample_weight: Any, client: Any = None) -> None:
        self._refuse_fewer_rows_than_components(source)
        warm = self.warm_start and hasattr(self, "converged_")
        start = Start(self.weights_, self.means_, self.precisions_) if warm else self._given_start(source)
        request = replace(self._request(source, start, client), weights=weights_of(sample_weight, source))
        if warm:
            request = replace(request, n_init=1)
        progress = VerboseProgress(self.verbose, self.verbose_interval, request.n_init)
        result = self._fitted(source, request, progress, client)
        progress.finish()
        converged, bounds = result.converged, list(result.lower_bounds)
        if warm and bounds:  # the first iteration may change nothing, compared with the last of the fit before
            converged = converged or abs(bounds[0] - self.lower_bound_) < self.tol
        if converged and self.reg_covar == 0 and _collapsed(result):
            raise RequestError(
                "Fitting the mixture model failed because some components have ill-defined empirical covariance (for "
                "instance caused by singleton or collapsed samples). Try to decrease the number of components, "
                "increase reg_covar, or scale the input data."
            )
        # Four passes are what stepwise EM was asked for, not a limit that it ran into.
        if not converged and self.max_iter > 0 and result.algorithm == "em":
            warnings.warn(
                "Best performing initialization did not converge. Try different init parameters, or increase max_iter, "
                "tol, or check for degenerate data.",
                ConvergenceWarning,
                stacklevel=4,  # the caller of fit, past scikit-learn's decorator
            )
        self._set(result.mixture, converged, bounds, float_dtype(source.dtype))
        # What was done to raw vectors to make these rows; `save` keeps it with the model.
        self._transformation = source.transformation

    def _refuse_fewer_rows_than_components(self, source: Source) -> None:
        if source.shape[0] < self.n_components:
            raise RequestError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {source.shape[0]}"
            )

    def _set(self, mixture: Mixture, converged: bool, bounds: list[float], dtype: np.dtype[np.generic]) -> None:
        for name in ("weights", "means", "covariances", "precisions_cholesky", "precisions"):
            setattr(self, f"{name}_", np.array(getattr(mixture, name), dtype=dtype))
        # In fp64 the attributes say it all.
        self._exact = (
            None if dtype == np.float64 else Mixture(**mixture.tensors(), covariance_type=self.covariance_type)
        )
        self.converged_ = converged
        self.n_iter_ = len(bounds)
        self.lower_bounds_ = bounds
        self.lower_bound_ = bounds[-1] if bounds else -np.inf

    def _score(self, X: Any, sample_weight: Any = None) -> tuple[float, int]:
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            n, settings = source.shape[0], self._inference(source)
            weights = weights_of(sample_weight, source)
            if weights is None:
                return inference.mean_log_likelihood(source, self.mixture_, settings), n
            scores = inference.log_likelihoods(source, self.mixture_, settings)
            return weighted_mean(scores, Weighting(weights), n), n

    def _labels(self, source: Source) -> np.ndarray:
        chunks = inference.posteriors(source, self.mixture_, 1, self._inference(source))
        return joined((chunk.labels[:, 0] for chunk in chunks), np.empty(source.shape[0], np.int64))

    def _n_parameters(self) -> int:
        return self.mixture_.n_parameters

    def _given_start(self, source: Source) -> Start:
        given = self.weights_init, self.means_init, self.precisions_init
        return checked_start(*given, self.covariance_type, self.n_components, source.shape[1])

    def _request(self, source: Source, start: Start, client: Any = None) -> FitRequest:
        return FitRequest(
            n_components=int(self.n_components),
            covariance_type=self.covariance_type,
            tol=float(self.tol),
            reg_covar=float(self.reg_covar),
            max_iter=int(self.max_iter),
            n_init=int(self.n_init),
            init=self.init_params,
            start=start,
            seed=self._seed(),
            precision=self._precision(source, client),
            device=self.device,
            memory_limit=self._limit(),
            chunk_rows=self.chunk_rows,
            algorithm=self.algorithm,
            sample_rows=self.sample_rows,
            accelerate=self.accelerate,
        )


_FITTED = (
    "weights_",
    "means_",
    "covariances_",
    "precisions_",
    "precisions_cholesky_",
    "converged_",
    "n_iter_",
    "lower_bound_",
    "lower_bounds_",
    "n_features_in_",
    "feature_names_in_",
)


def _collapsed(result: FitResult) -> bool:
    """Whether the last update of the best model had to give a component volume."""
    bound = result.lower_bounds[-1] if result.lower_bounds else None
    return any(
        record["degenerate"]
        for record in result.history
        if record["iteration"] == result.n_iter and record["lower_bound"] == bound
    )


def _copy_fitted(fitted: Any, other: Any) -> None:
    for name in _FITTED:
        if hasattr(fitted, name):
            value = getattr(fitted, name)
            setattr(other, name, value.copy() if isinstance(value, (np.ndarray, list)) else value)
