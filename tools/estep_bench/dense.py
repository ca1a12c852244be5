"""The E-step as torch writes it: the plain baseline, and what fits the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame
from streamgmm.kernels import Problem
from streamgmm.kernels.natural import natural_parameters
from streamgmm.kernels.tiled import n_row_features
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics


class DenseEStep:
    """The textbook E-step as torch writes it: features, one product, softmax, one product; ``chunk`` rows at once.

    `streamgmm.kernels.natural` has the table of features.
    """

    def __init__(self, mixture: Mixture, frame: Frame, device: torch.device, chunk: int | None = None) -> None:
        def narrow(values: np.ndarray) -> np.ndarray:
            return values.astype(np.float32).astype(np.float64)

        natural = natural_parameters(mixture, frame, narrow)
        theta = natural.linear if natural.common is not None else np.concatenate([natural.linear, natural.quadratic], 1)
        self._frame, self._kind, self._k = frame, mixture.covariance_type, mixture.n_components
        self._constants = torch.tensor(natural.constants, dtype=torch.float32, device=device)
        self._theta = torch.tensor(theta, dtype=torch.float32, device=device)
        self._common = None if natural.common is None else torch.tensor(natural.common, device=device).float()
        width = 3 * self._k + 2 * n_row_features(Problem(self._k, mixture.n_features, self._kind))
        self._chunk = chunk or max(1024, (1 << 30) // width)

    def __call__(self, rows: Tensor) -> tuple[Statistics, Tensor]:
        """Statistics about the frame's origin, and log p of each row (n,)."""
        d = rows.shape[1]
        statistics = Statistics.zeros(self._kind, self._k, torch.zeros(d), rows.device)
        likelihoods = []
        for piece in rows.split(self._chunk):
            x = self._frame.apply(piece, torch.float32)
            phi = self._features(x)
            joint = torch.addmm(self._constants, phi, self._theta.T)
            log_likelihood = joint.logsumexp(1)
            resp = joint.sub_(log_likelihood[:, None]).exp_()
            sums = resp.T @ phi
            statistics.counts.add_(resp.sum(0))
            statistics.sums.add_(sums[:, :d])
            scatter = x.T @ x if self._common is not None else sums[:, d:]
            statistics.scatter.add_(scatter.reshape(statistics.scatter.shape))
            if self._common is not None:
                log_likelihood -= 0.5 * (x * (x @ self._common)).sum(1)
            likelihoods.append(log_likelihood)
        statistics.n_rows.add_(len(rows))
        return statistics, torch.cat(likelihoods)

    def _features(self, x: Tensor) -> Tensor:
        if self._kind == "tied":
            return x
        if self._kind == "full":
            i, j = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
            return torch.cat([x, x[:, i] * x[:, j]], dim=1)
        return torch.cat([x, x * x if self._kind == "diag" else x.square().sum(1, keepdim=True)], dim=1)


@contextmanager
def product_precision(mode: str) -> Iterator[None]:
    """torch's float32 products: ``highest`` is fp32, ``high`` tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
