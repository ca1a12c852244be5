"""Choosing the number of components: several models, one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgmm.estimator.data import float_dtype, rows_of
from streamgmm.estimator.gaussian_mixture import GaussianMixture
from streamgmm.fitting import fit
from streamgmm.result import FitResult, comparison
from streamgmm.seeding import Start
from streamgmm.weighting import open_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Selection:
    """Fitted mixtures of several sizes, and the one to take.

    Attributes
    ----------
    models : tuple of GaussianMixture
        One for each number of components, in the order asked for.
    best : GaussianMixture
    criterion : {'bic', 'aic', 'held_out'}
        By which ``best`` was chosen.
    result : FitResult
        How the fit went.
    """

    models: tuple[GaussianMixture, ...]
    criterion: str
    result: FitResult

    @property
    def best(self) -> GaussianMixture:
        return self.models[self.result.best]

    @property
    def table(self) -> list[dict[str, object]]:
        """A record a model: ``n_components``, ``log_likelihood``, ``held_out``, ``bic``, ``aic``, ``n_iter``, …"""
        return [model.summary() for model in self.result.models]

    def plot(self) -> Figure:
        """The criteria against the number of components; needs matplotlib (``pip install 'streamgmm[plot]'``)."""
        from streamgmm.report import selection

        return selection(self.table)

    def __str__(self) -> str:
        return "\n".join(comparison(self.result.models, self.result.best))


def select_components(
    X: Any,
    n_components: Sequence[int],
    *,
    criterion: str = "auto",
    holdout: float = 0.0,
    sample_weight: Any = None,
    **parameters: Any,
) -> Selection:
    """Fit a mixture for each of ``n_components``, all on the same passes over ``X``, and compare them.

    Each model has the bits of a fit of its own from the same sample. One more pass at the end scores all of them.

    Parameters
    ----------
    X : array-like, path, or whatever `GaussianMixture.fit` takes
        (N, D).
    n_components : sequence of int
    criterion : {'auto', 'bic', 'aic', 'held_out'}
        ``auto`` is ``held_out`` where rows are held out, else ``bic``.
    holdout : float
        Fraction of the rows, chosen by a hash of their number, that no model is trained on and each is scored on.
    sample_weight : (N,) array or path, optional
    **parameters
        Of `GaussianMixture`, except the starting values.

    Raises
    ------
    RequestError, DataError
        As `GaussianMixture.fit`.

    Examples
    --------
    >>> import numpy as np
    >>> from streamgmm import select_components
    >>> X = np.random.default_rng(0).normal(size=(1000, 2)) + [[0, 9]] * np.arange(2).repeat(500)[:, None]
    >>> select_components(X, [1, 2, 4], covariance_type="spherical", random_state=0, device="cpu").best.n_components
    2
    """
    sizes = tuple(int(k) for k in n_components)
    estimator = GaussianMixture(**parameters)
    with rows_of(estimator, X, reset=True) as source:
        request = replace(
            estimator._request(source, Start()),
            n_components=sizes,
            criterion=criterion,
            holdout=holdout,
            weights=None if sample_weight is None else open_weights(sample_weight, source.shape[0]),
        )
        result = fit(source, request, None if estimator.checkpoint is None else Path(estimator.checkpoint))
        dtype = float_dtype(source.dtype)
    models = []
    for size, model in zip(sizes, result.models, strict=True):
        fitted = GaussianMixture(**{**parameters, "n_components": size})
        fitted._set(model.mixture, model.converged, list(model.lower_bounds), dtype)
        fitted.n_features_in_ = model.mixture.n_features
        models.append(fitted)
    return Selection(tuple(models), request.chosen_by, result)
