"""`GaussianMixture`: scikit-learn's interface over the streamed fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from streamgmm import inference
from streamgmm.device import resolve_device
from streamgmm.errors import RequestError
from streamgmm.fitting import FitResult, fit
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source
from streamgmm.mixture import Float64Array, Mixture, load_model
from streamgmm.request import FitRequest
from streamgmm.seeding import Start
from streamgmm.units import parse_bytes


class GaussianMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Gaussian mixture whose data need not fit in memory.

    Parameters, attributes and signs are scikit-learn's; ``X`` may be an array, a memory map, a torch tensor, a
    ``zarr.Array``, a Dask array, a path, or a list of paths. The parameters after ``verbose`` are this package's.

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
    init_params : {'kmeans', 'k-means++', 'random', 'random_from_data'}, default 'kmeans'
        On a uniform sample of the rows.
    weights_init, means_init, precisions_init : arrays, optional
        (K,), (K, D), and the shape of ``precisions_``.
    random_state : int, RandomState or None
    warm_start : bool, default False
        Start the next ``fit`` from the parameters of the last.
    verbose : int, default 0
        1 prints a line an iteration.
    device : {'auto', 'cpu', 'cuda', 'cuda:N'}, default 'auto'
    precision : {'auto', 'medium', 'high', 'highest'}, default 'auto'
        ``highest`` is fp64; ``auto`` takes the fastest that agrees with it on a sample, checked every iteration.
    memory_limit : str or int, optional
        Bytes on the device (growth of the process on a CPU), such as ``'4GiB'``.
    chunk_rows : int, optional
        Rows moved at once; rounded to a multiple or a fraction of 65,536. Never changes a result.
    checkpoint : path, optional
        A RUN folder: the fit is saved there as it goes, and resumed from there.

    Attributes
    ----------
    weights_ : (K,)
    means_ : (K, D)
    covariances_, precisions_, precisions_cholesky_ : as in scikit-learn
    converged_ : bool
    n_iter_ : int
    lower_bound_ : float
    lower_bounds_ : list of float
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from streamgmm import GaussianMixture
    >>> X = np.random.default_rng(0).normal(size=(1000, 2)) + [[0, 9]] * np.arange(2).repeat(500)[:, None]
    >>> GaussianMixture(2, random_state=0, device="cpu").fit(X).means_.shape
    (2, 2)
    """

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
        device: str = "auto",
        precision: str = "auto",
        memory_limit: str | int | None = None,
        chunk_rows: int | None = None,
        checkpoint: str | Path | None = None,
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
        self.device = device
        self.precision = precision
        self.memory_limit = memory_limit
        self.chunk_rows = chunk_rows
        self.checkpoint = checkpoint

    def fit(self, X: Any, y: Any = None) -> GaussianMixture:
        """Estimate the parameters from every row of ``X``.

        Raises
        ------
        RequestError (a ValueError)
            A parameter or the data cannot be used; the message names it, its value and the remedy.
        """
        source = open_source(X)
        result = fit(source, self._request(), None if self.checkpoint is None else Path(self.checkpoint))
        self._keep(result)
        if self.verbose:
            for record in result.history:
                print(f"iteration {record['iteration']}: lower bound {record['lower_bound']:.6f}")
        if not result.converged and self.max_iter > 0:
            warnings.warn(
                f"not converged after {result.n_iter} iterations; raise max_iter or tol, or check for degenerate data",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def fit_predict(self, X: Any, y: Any = None) -> np.ndarray:
        """``fit(X).predict(X)``."""
        return self.fit(X).predict(X)

    def predict(self, X: Any) -> np.ndarray:
        """Most responsible component of each row, (N,) int64."""
        chunks = inference.posteriors(open_source(X), self.mixture_, 1, self._inference())
        return np.asarray(np.concatenate([chunk.labels[:, 0] for chunk in chunks]), dtype=np.int64)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Responsibilities, (N, K). For more rows than memory holds use ``streamgmm predict --proba``."""
        chunks = inference.responsibilities(open_source(X), self.mixture_, self._inference())
        return np.asarray(np.concatenate(list(chunks)), dtype=np.float64)

    def score_samples(self, X: Any) -> Float64Array:
        """log p(x) of each row, (N,), nats."""
        return np.concatenate(list(inference.log_likelihoods(open_source(X), self.mixture_, self._inference())))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood, nats a sample; streamed in bounded memory."""
        return inference.mean_log_likelihood(open_source(X), self.mixture_, self._inference())

    def bic(self, X: Any) -> float:
        """Bayesian information criterion; lower is better."""
        source = open_source(X)
        n = source.shape[0]
        return float(-2 * self.score(source) * n + self.mixture_.n_parameters * np.log(n))

    def aic(self, X: Any) -> float:
        """Akaike information criterion; lower is better."""
        source = open_source(X)
        return float(-2 * self.score(source) * source.shape[0] + 2 * self.mixture_.n_parameters)

    def sample(self, n_samples: int = 1) -> tuple[Float64Array, np.ndarray]:
        """Rows (n, D) drawn from the mixture, and their components (n,)."""
        return inference.sample(self.mixture_, n_samples, check_random_state(self.random_state))

    @property
    def mixture_(self) -> Mixture:
        """The fitted parameters as a `Mixture`."""
        check_is_fitted(self, "weights_")
        return Mixture(self.weights_, self.means_, self.covariances_, self.covariance_type)

    def save(self, path: str | Path) -> None:
        """Write the fitted mixture as a checksummed safetensors file."""
        facts = {"converged": self.converged_, "lower_bounds": list(self.lower_bounds_)}
        self.mixture_.save(path, result=facts)

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
        estimator._set(mixture, bool(facts.get("converged", False)), list(facts.get("lower_bounds", [])))
        return estimator

    def _keep(self, result: FitResult) -> None:
        self._set(result.mixture, result.converged, list(result.lower_bounds))

    def _set(self, mixture: Mixture, converged: bool, lower_bounds: list[float]) -> None:
        self.weights_ = mixture.weights
        self.means_ = mixture.means
        self.covariances_ = mixture.covariances
        self.precisions_cholesky_ = mixture.precisions_cholesky
        self.precisions_ = mixture.precisions
        self.converged_ = converged
        self.n_iter_ = len(lower_bounds)
        self.lower_bounds_ = lower_bounds
        self.lower_bound_ = lower_bounds[-1] if lower_bounds else -np.inf
        self.n_features_in_ = mixture.n_features

    def _request(self) -> FitRequest:
        start = Start(self.weights_init, self.means_init, self.precisions_init)
        if self.warm_start and hasattr(self, "weights_"):
            start = Start(self.weights_, self.means_, self.precisions_)
        if not isinstance(self.n_components, (int, np.integer)):
            raise RequestError(f"n_components must be an int; got {self.n_components!r}")
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(2**31)
        return FitRequest(
            n_components=int(self.n_components),
            covariance_type=self.covariance_type,
            tol=self.tol,
            reg_covar=self.reg_covar,
            max_iter=self.max_iter,
            n_init=self.n_init,
            init=self.init_params,
            start=start,
            seed=int(seed),
            precision=self.precision,
            device=self.device,
            memory_limit=self._limit(),
            chunk_rows=self.chunk_rows,
        )

    def _inference(self) -> InferenceSettings:
        return InferenceSettings(resolve_device(self.device), self.precision, self._limit(), self.chunk_rows)

    def _limit(self) -> int | None:
        return None if self.memory_limit is None else parse_bytes(self.memory_limit, "memory_limit")
