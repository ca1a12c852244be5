"""`KMeans`: scikit-learn's interface over streamed Lloyd iterations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from streamgmm.errors import RequestError
from streamgmm.estimator.data import (
    float_dtype,
    is_iterator,
    is_streamed,
    joined,
    result_dtype,
    rows_of,
    total_weight,
    weighted_sum,
    weights_of,
)
from streamgmm.estimator.distances import distances, nearest
from streamgmm.estimator.lloyd_progress import LloydProgress
from streamgmm.estimator.streamed import Streamed
from streamgmm.io.sources.base import Source
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.seeding import STREAMED, Start
from streamgmm.weighting import Weighting

_RANDOM_STARTS = 10
"""What scikit-learn's ``n_init='auto'`` means where the first centres are random rows."""


class KMeans(Streamed, ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """K-means whose data need not fit in memory.

    Parameters, attributes, signs and messages are scikit-learn's (docs/sklearn.md lists what differs). ``X`` may be an
    array, a data frame, a memory map, a torch tensor, a ``zarr.Array``, a Dask array, a path, a list of paths, or an
    iterator of arrays. The parameters after ``random_state`` are this package's.

    Parameters
    ----------
    n_clusters : int, default 8
    init : {'k-means++', 'random', 'k-means||'} or (K, D) array, default 'k-means++'
        On a uniform sample of the rows; ``k-means||`` draws from every row, in three passes, for many clusters.
    n_init : 'auto' or int, default 'auto'
        Starts trained side by side on the same passes; the best is kept. ``auto`` is 10 for ``'random'``, else 1.
    max_iter : int, default 300
    tol : float, default 1e-4
        Converged when the centres move by less: Σ‖Δ‖² as a fraction of the data's mean variance a feature.
    verbose : int, default 0
        1 prints the inertia of every iteration.
    random_state : int, RandomState or None
    compute_labels : 'auto' or bool, default 'auto'
        Whether ``fit`` keeps ``labels_``. ``auto`` does for arrays, lists and data frames in memory, as scikit-learn,
        and not for what is streamed, whose labels may not fit in memory.
    device : {'auto', 'cpu', 'cuda', 'cuda:N'}, default 'auto'
    precision : {'auto', 'medium', 'high', 'highest'}, default 'auto'
        ``highest`` is fp64; ``auto`` takes the fastest that agrees with it on a sample, checked every iteration. On a
        CPU ``auto`` works on float64 rows in fp64.
    memory_limit : str or int, optional
        Bytes on the device (growth of the process on a CPU), such as ``'4GiB'``.
    chunk_rows : int, optional
        Rows moved at once; rounded to a multiple or a fraction of 65,536. Never changes a result.
    checkpoint : path, optional
        A RUN folder: the fit is saved there as it goes, and resumed from there.
    sample_rows : int, optional
        Rows of the sample that the first centres are made from, at least ``n_clusters``; default: by N, D and K, mostly
        32,768.

    Attributes
    ----------
    cluster_centers_ : (K, D)
        float32 where the rows are float32, else float64.
    labels_ : (N,) int32
        The nearest of ``cluster_centers_`` to each row; see ``compute_labels``.
    inertia_ : float
        Σ w‖x − c‖² over the rows, of the same centres: one more pass at the end, in fp64 and without cancellation.
    n_iter_ : int
    n_features_in_ : int
    feature_names_in_ : (D,), where X had names

    Examples
    --------
    >>> import numpy as np
    >>> from streamgmm import KMeans
    >>> X = np.array([[1, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
    >>> sorted(KMeans(2, random_state=0, device="cpu").fit(X).cluster_centers_.tolist())
    [[1.0, 2.0], [10.0, 2.0]]
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions({"k-means++", "random", STREAMED}), "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "compute_labels": ["boolean", StrOptions({"auto"})],
        **Streamed._stream_constraints,
    }

    cluster_centers_: np.ndarray
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        compute_labels: bool | str = "auto",
        device: str = "auto",
        precision: str = "auto",
        memory_limit: str | int | None = None,
        chunk_rows: int | None = None,
        checkpoint: str | Path | None = None,
        sample_rows: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.compute_labels = compute_labels
        self.device = device
        self.precision = precision
        self.memory_limit = memory_limit
        self.chunk_rows = chunk_rows
        self.checkpoint = checkpoint
        self.sample_rows = sample_rows

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, client: Any = None) -> KMeans:
        """Find the centres from every row of ``X``; an iterator is read once, into a temporary file.

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
        with rows_of(self, X, reset=True, client=client) as source:
            self._fit(source, sample_weight, self._keeps_labels(X), client)
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """``fit(X).predict(X)``; ``labels_`` are kept whatever ``compute_labels`` says."""
        with rows_of(self, X, reset=True) as source:
            self._fit(source, sample_weight, True)
        return self.labels_

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """``fit(X).transform(X)``."""
        with rows_of(self, X, reset=True) as source:
            self._fit(source, sample_weight, self._keeps_labels(X))
            return self._distances(source)

    def predict(self, X: Any) -> np.ndarray:
        """The nearest centre of each row, (N,) int32; the lower number of equals."""
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            found = nearest(source, self.cluster_centers_, self._inference(source))
            return joined((labels for labels, _ in found), np.empty(source.shape[0], np.int32))

    def transform(self, X: Any) -> np.ndarray:
        """The distance of each row to each centre, (N, K)."""
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            return self._distances(source)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """−Σ w‖x − c‖² over the rows, each with its nearest centre; streamed in bounded memory."""
        check_is_fitted(self)
        with rows_of(self, X, reset=False) as source:
            found = nearest(source, self.cluster_centers_, self._inference(source))
            return -weighted_sum((squares for _, squares in found), Weighting(weights_of(sample_weight, source)))

    @property
    def labels_(self) -> np.ndarray:
        check_is_fitted(self)
        if self._labels is None:
            raise AttributeError("labels_ were not kept, for X was streamed; set compute_labels=True, or call predict")
        return self._labels

    @labels_.setter
    def labels_(self, labels: np.ndarray | None) -> None:
        self._labels = labels

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def _fit(self, source: Source, sample_weight: Any, keep_labels: bool, client: Any = None) -> None:
        request = self._request(source, weights_of(sample_weight, source), client)
        result = self._fitted(source, request, self._progress(request, source.shape[0]), client)
        self.cluster_centers_ = result.mixture.means.astype(float_dtype(source.dtype))
        self.n_iter_ = result.n_iter
        self.labels_ = np.empty(source.shape[0], np.int32) if keep_labels else None
        self._assess(source, Weighting(request.weights))

    def _keeps_labels(self, X: Any) -> bool:
        if self.compute_labels == "auto":
            return not (is_iterator(X) or is_streamed(X))
        return bool(self.compute_labels)

    def _assess(self, source: Source, weighting: Weighting) -> None:
        """Labels and inertia of the final centres; warn where some are nobody's nearest."""
        occupied = np.zeros(self.n_clusters, dtype=bool)

        def squares() -> Iterator[np.ndarray]:
            start = 0
            for labels, found in nearest(source, self.cluster_centers_, self._inference(source)):
                occupied[labels] = True
                if self._labels is not None:
                    self._labels[start : start + len(labels)] = labels
                start += len(labels)
                yield found

        self.inertia_ = weighted_sum(squares(), weighting)
        if not occupied.all():
            warnings.warn(
                f"Number of distinct clusters ({occupied.sum()}) found smaller than n_clusters ({self.n_clusters}). "
                "Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=5,  # the caller of fit, past scikit-learn's decorator
            )

    def _progress(self, request: FitRequest, n_samples: int) -> Progress:
        if not self.verbose:
            return Progress()
        return LloydProgress(request.n_init, total_weight(Weighting(request.weights), n_samples), request.tol)

    def _distances(self, source: Source) -> np.ndarray:
        dtype = result_dtype(source.dtype, self.cluster_centers_.dtype)
        out = np.empty((source.shape[0], len(self.cluster_centers_)), dtype)
        return joined(distances(source, self.cluster_centers_, self._inference(source)), out)

    def _request(self, source: Source, weights: Source | None, client: Any = None) -> FitRequest:
        n, d = source.shape
        if n < self.n_clusters:
            raise RequestError(f"n_samples={n} should be >= n_clusters={self.n_clusters}.")
        given = None if isinstance(self.init, str) else self._given_centres(d)
        return FitRequest(
            n_components=int(self.n_clusters),
            covariance_type="spherical",
            model="kmeans",
            collapse="reseed",
            tol=float(self.tol),
            max_iter=int(self.max_iter),
            n_init=self._n_starts(given is not None),
            init="k-means++" if given is not None else str(self.init),
            start=Start(means=given),
            seed=self._seed(),
            weights=weights,
            precision=self._precision(source, client),
            device=self.device,
            memory_limit=self._limit(),
            chunk_rows=self.chunk_rows,
            sample_rows=self.sample_rows,
        )

    def _given_centres(self, n_features: int) -> np.ndarray:
        centres = check_array(self.init, dtype=np.float64, input_name="init")
        for length, expected, what in (
            (centres.shape[0], self.n_clusters, "clusters"),
            (centres.shape[1], n_features, "features of the data"),
        ):
            if length != expected:
                raise RequestError(
                    f"The shape of the initial centers {centres.shape} does not match the number of {what} {expected}."
                )
        return np.asarray(centres)

    def _n_starts(self, centres_given: bool) -> int:
        if self.n_init == "auto":
            return _RANDOM_STARTS if not centres_given and self.init == "random" else 1
        if centres_given and self.n_init != 1:
            warnings.warn(
                f"Explicit initial center position passed: performing only one init in {type(self).__name__} instead "
                f"of n_init={self.n_init}.",
                RuntimeWarning,
                stacklevel=6,  # as above
            )
            return 1
        return int(self.n_init)
