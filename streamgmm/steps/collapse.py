"""What happens to components that own no row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from streamgmm.errors import RequestError
from streamgmm.estep import bind
from streamgmm.frame import Frame
from streamgmm.mixture import Mixture
from streamgmm.steps.split import split_into

POLICIES = ("floor", "reseed", "split", "drop")


class Repair(Protocol):
    """Deals with the components at ``empty`` (int64); returns ``mixture`` itself where there is nothing to do."""

    def __call__(self, mixture: Mixture, empty: np.ndarray) -> Mixture: ...


def repair_policy(name: str, pool: Tensor, frame: Frame) -> Repair:
    """The policy called ``name``.

    ``floor`` keeps an empty component where it was, with the weight of a millionth of a row, from which it can recover;
    ``reseed`` moves it to the least likely row of ``pool`` (n, D), a sample; ``split`` gives it half of the heaviest
    component; ``drop`` takes it away.
    """
    policies: dict[str, Repair] = {"floor": keep, "reseed": Reseed(pool, frame), "split": _split, "drop": _drop}
    if name not in policies:
        raise RequestError(f"collapse must be one of {', '.join(POLICIES)}; got {name!r}")
    return policies[name]


def keep(mixture: Mixture, empty: np.ndarray) -> Mixture:
    """Leave empty components where they are."""
    return mixture


def _split(mixture: Mixture, empty: np.ndarray) -> Mixture:
    return split_into(mixture, empty) if 0 < len(empty) < mixture.n_components else mixture


def _drop(mixture: Mixture, empty: np.ndarray) -> Mixture:
    if not 0 < len(empty) < mixture.n_components:
        return mixture
    left = np.setdiff1d(np.arange(mixture.n_components), empty)
    weights = mixture.weights[left]
    covariances = mixture.covariances if mixture.covariance_type == "tied" else mixture.covariances[left]
    return Mixture(weights / weights.sum(), mixture.means[left], covariances, mixture.covariance_type)


@dataclass(frozen=True, eq=False)
class Reseed:
    """Empty components restart at the least likely rows of ``pool`` (n, D), with the others' mean covariance."""

    pool: Tensor
    frame: Frame

    def __call__(self, mixture: Mixture, empty: np.ndarray) -> Mixture:
        if not 0 < len(empty) < mixture.n_components:
            return mixture
        bound = bind(mixture, self.frame, "highest", torch.device("cpu"), workers=1)
        rows = self.pool.cpu()
        likelihood = bound.log_likelihood(rows).numpy()
        # Rows alike would seed components alike: each value counts once.
        _, distinct = np.unique(rows.double().numpy(), axis=0, return_index=True)
        worst = distinct[np.argsort(likelihood[distinct], kind="stable")][: len(empty)]
        moved = empty[: len(worst)]
        weights, means, covariances = mixture.weights.copy(), mixture.means.copy(), mixture.covariances
        means[moved] = rows[torch.from_numpy(worst)].double().numpy()
        weights[moved] = 1.0 / mixture.n_components
        if mixture.covariance_type != "tied":
            alive = np.setdiff1d(np.arange(mixture.n_components), empty)
            covariances = covariances.copy()
            covariances[moved] = np.average(covariances[alive], axis=0, weights=mixture.weights[alive])
        return Mixture(weights / weights.sum(), means, covariances, mixture.covariance_type)
