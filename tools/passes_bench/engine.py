"""The package's own E- and M-step over rows in memory, every row counted as if it came from storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from passes_bench.datasets import DataSet
from streamgmm.estep import BoundMixture, bind, e_step
from streamgmm.frame import Frame, frame_of
from streamgmm.mixture import Mixture
from streamgmm.mstep import m_step
from streamgmm.seeding import Start, first_mixture
from streamgmm.statistics import Statistics
from streamgmm.steps.stepwise import stepwise_update

REG_COVAR = 1e-5
"""Of a mean variance of one. Flat patches of photographs vary by 3.6e-4: with 1e-3, EM on them was not monotone."""


@dataclass(eq=False)
class Engine:
    """E-step, M-step and likelihood in one frame.

    Attributes
    ----------
    rows : (N, D) float32 tensor
        Stand for what is on disk: reading them is counted.
    held_out : (H, D) float32 tensor
    sample : (n, D) float32 tensor
        Uniform rows that pass 0 left in memory; free from then on.
    covariance_type : str
    frame : Frame
    rows_read : int
    """

    rows: torch.Tensor
    held_out: torch.Tensor
    sample: torch.Tensor
    covariance_type: str
    frame: Frame
    rows_read: int = 0

    @classmethod
    def over(cls, data: DataSet, covariance_type: str, budget: float, seed: int) -> Engine:
        """With a sample of ``budget``·N rows, for which one pass is counted: it fills while everything goes by."""
        n = len(data.training)
        chosen = np.sort(np.random.default_rng([seed, 99]).permutation(n)[: int(budget * n)])
        sample = data.training[chosen]
        frame = frame_of(sample, covariance_type)
        rows, held_out = torch.from_numpy(data.training), torch.from_numpy(data.held_out)
        return cls(rows, held_out, torch.from_numpy(sample), covariance_type, frame, n)

    @property
    def passes(self) -> float:
        return self.rows_read / len(self.rows)

    def seeded(self, n_components: int, seed: int) -> Mixture:
        """The package's own start: k-means on the sample."""
        frame = frame_of(self.sample.numpy(), "spherical")
        kind = self.covariance_type
        return first_mixture(self.sample, frame, n_components, kind, "kmeans", Start(), REG_COVAR, [seed, 1], workers=1)

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """One pass in order, ``size`` rows at a time, counted."""
        return self.counted(self.rows.split(size))

    def counted(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for block in blocks:
            self.rows_read += len(block)
            yield block

    def bound(self, mixture: Mixture) -> BoundMixture:
        return bind(mixture, self.frame, "high", torch.device("cpu"), workers=1)

    def statistics(self, mixture: Mixture, rows: torch.Tensor) -> Statistics:
        """Sums over ``rows`` in the data's units."""
        bound = self.bound(mixture)
        sums = bound.empty_statistics()
        e_step(rows, bound, sums)
        return self.frame.restore(bound.finish(sums))

    def em(self, mixture: Mixture, rows: torch.Tensor, iterations: int = 1) -> Mixture:
        """EM over ``rows`` in memory, not counted."""
        for _ in range(iterations):
            mixture = self.updated(self.statistics(mixture, rows), mixture)
        return mixture

    def updated(self, statistics: Statistics, previous: Mixture) -> Mixture:
        return m_step(statistics, REG_COVAR, previous).mixture

    def stepped(self, mixture: Mixture, rows: torch.Tensor, gamma: float) -> Mixture:
        """One stepwise update."""
        return stepwise_update(mixture, self.statistics(mixture, rows), gamma, REG_COVAR).mixture

    def likelihood(self, mixture: Mixture) -> float:
        """Mean log-likelihood of the rows held out, nats; not counted, as it is the measure and not the method."""
        return float(self.bound(mixture).log_likelihood(self.held_out).mean())
