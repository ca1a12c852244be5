"""The E-step as the textbook has it, in fp64: the oracle that every fast kernel is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem, TopComponents
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics


@dataclass(frozen=True, eq=False)
class ReferenceParameters:
    """The mixture itself, and the frame in which statistics are wanted."""

    mixture: Mixture
    frame: Frame


@dataclass(frozen=True)
class ReferenceKernel:
    """`Kernel` by Mahalanobis distances, one component at a time (Bishop 2006, eqs. 9.13 and 2.43)."""

    hard: bool = False

    def granule(self, problem: Problem) -> int:
        return 1024

    def scratch_bytes(self, problem: Problem, rows: int, workers: int, top: int = 0) -> int:
        return 8 * rows * (2 * problem.n_components + 2 * problem.n_features**2)

    def parameters(self, mixture: Mixture, frame: Frame, device: torch.device) -> ReferenceParameters:
        return ReferenceParameters(mixture, frame)

    def accumulate(
        self, rows: Tensor, parameters: ReferenceParameters, statistics: Statistics, weights: Tensor | None = None
    ) -> None:
        if weights is None:
            weights = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        for tile, weight in zip(rows.split(1024), weights.double().split(1024), strict=True):
            resp, log_likelihood = self._responsibilities(log_joint(tile, parameters.mixture))
            resp = weight[:, None] * resp
            x = parameters.frame.apply(tile, torch.float64)
            statistics.counts.add_(resp.sum(0))
            statistics.sums.add_(resp.T @ x)
            kind = statistics.covariance_type
            if kind == "tied":
                statistics.scatter.add_((weight[:, None] * x).T @ x)
            elif kind == "full":
                i, j = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
                statistics.scatter.add_(resp.T @ (x[:, i] * x[:, j]))
            else:
                squares = x**2 if kind == "diag" else (x**2).sum(1)
                statistics.scatter.add_(resp.T @ squares)
            statistics.log_likelihood.add_(weight @ log_likelihood)
            statistics.n_rows.add_(weight.sum())

    def finish(self, statistics: Statistics, parameters: ReferenceParameters) -> Statistics:
        return statistics

    def log_likelihood(self, rows: Tensor, parameters: ReferenceParameters) -> Tensor:
        return self._responsibilities(log_joint(rows, parameters.mixture))[1]

    def top(self, rows: Tensor, parameters: ReferenceParameters, m: int) -> TopComponents:
        joint = log_joint(rows, parameters.mixture)
        resp, log_likelihood = self._responsibilities(joint)
        labels = joint.argsort(dim=1, descending=True, stable=True)[:, :m]
        return TopComponents(log_likelihood, labels.int(), resp.gather(1, labels).float())

    def _responsibilities(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Of log joint densities (n, K): r (n, K), and log p(x) (n,)."""
        if self.hard:
            greatest, labels = joint.max(dim=1)
            return torch.nn.functional.one_hot(labels, joint.shape[1]).double(), greatest
        log_likelihood = joint.logsumexp(1)
        return (joint - log_likelihood[:, None]).exp(), log_likelihood


def log_joint(rows: Tensor, mixture: Mixture) -> Tensor:
    """log w_k p_k(x), (n, K) fp64, nats."""
    x = rows.double()
    with np.errstate(divide="ignore"):
        log_weights = np.log(mixture.weights)
    columns = []
    for k in range(mixture.n_components):
        chol = _whitening(mixture, k, x.device)
        difference = x - torch.tensor(mixture.means[k], device=x.device)
        whitened = difference * chol if chol.ndim == 1 else difference @ chol
        diagonal = chol if chol.ndim == 1 else chol.diagonal()
        constant = log_weights[k] - 0.5 * mixture.n_features * np.log(2 * np.pi) + float(diagonal.log().sum())
        columns.append(constant - 0.5 * (whitened**2).sum(1))
    return torch.stack(columns, dim=1)


def _whitening(mixture: Mixture, k: int, device: torch.device) -> Tensor:
    """U with U Uᵀ = Σ_k⁻¹ (D, D), or 1/σ (D,)."""
    chol = mixture.precisions_cholesky
    if mixture.covariance_type == "spherical":
        chol = np.full(mixture.n_features, chol[k])
    elif mixture.covariance_type != "tied":
        chol = chol[k]
    return torch.tensor(chol, device=device)
