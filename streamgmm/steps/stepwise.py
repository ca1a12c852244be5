"""Stepwise EM: many small updates within a pass.

The state is an average of sufficient statistics per row, s. A block of b rows moves it by

    s ← (1 − γ) s + γ ŝ,        γ = 2b / (W + b),

with ŝ the block's mean statistics at the current parameters, which then follow from s by the ordinary M-step
(Cappé & Moulines 2009, "On-line expectation-maximization algorithm for latent data models", eq. 11; for blocks, Liang &
Klein 2009, "Online EM for unsupervised models"). Deviation from both: γ is not (t + 2)^−α. An exponential average with
the γ above has the variance of a plain average of W rows, so a schedule is a window W in rows, which grows from about
what the start was trained on, so that no step forgets more than it learns, to the whole data, where the noise is that
of full-batch EM. It does not depend on the size of a block then, and Σγ, the EM iterations that a pass is worth, is
about 2N/W.

Parameters and s determine each other (`implied_statistics`), so a mixture and the number of rows seen are the whole
state: nothing else is kept between blocks, or saved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from streamgmm.errors import NumericalError
from streamgmm.mixture import Mixture
from streamgmm.mstep import MStep, m_step
from streamgmm.statistics import Statistics
from streamgmm.steps.candidate import NO_WEIGHT, Candidate

_MIXED = ("counts", "sums", "scatter")


@dataclass(frozen=True)
class Schedule:
    """How many rows are averaged over, by the rows seen so far.

    Attributes
    ----------
    first, last : float
        Windows, in rows, at the beginning and after ``span`` rows; at least one row.
    span : float
        Rows while the window grows, by the same factor for each row.
    """

    first: float
    last: float
    span: float

    def window(self, seen: int) -> float:
        """Rows to average over after ``seen`` rows."""
        return float(self.first * (self.last / self.first) ** min(1.0, seen / self.span))

    def step_size(self, seen: int, block_rows: float) -> float:
        """γ in (0, 1] of the next ``block_rows`` rows; 1 forgets all that came before."""
        return step_size(self.window(seen), block_rows)


def step_size(window: float, block_rows: float) -> float:
    """γ in (0, 1] with which an exponential average of blocks has the variance of an average of ``window`` rows.

    Weights γ(1−γ)^i of blocks of b rows give the variance Σ(γ(1−γ)^i)²/b = γ/(b(2−γ)) of one row's; that is 1/W here.
    """
    return float(min(1.0, 2.0 * block_rows / (window + block_rows)))


@dataclass(frozen=True)
class StepwiseStep:
    """An update within a pass.

    Attributes
    ----------
    schedule : Schedule
    reg_covar : float
        Added to every variance, in the data's squared units.
    """

    schedule: Schedule
    reg_covar: float

    def __call__(self, candidate: Candidate, block: Statistics, seen: int) -> Candidate:
        """The candidate after the rows of ``block`` (data's units), ``seen`` rows after the beginning of the schedule.

        A block without weight leaves it as it is.
        """
        rows = float(block.n_rows)
        if not rows > 0:
            return replace(candidate)
        update = stepwise_update(candidate.mixture, block, self.schedule.step_size(seen, rows), self.reg_covar)
        return replace(candidate, mixture=update.mixture, empty=update.empty, degenerate=update.degenerate)

    def ended(self, candidate: Candidate, log_likelihood: float, n_rows: float) -> Candidate:
        """The candidate after a pass, with the mean likelihood of its rows, each before it was learnt from.

        Raises
        ------
        NumericalError
            The rows have no weight at all.
        """
        if not n_rows > 0:
            raise NumericalError(NO_WEIGHT)
        bounds = (*candidate.lower_bounds, log_likelihood / n_rows)
        return replace(candidate, lower_bounds=bounds, n_rows=n_rows)


def stepwise_update(mixture: Mixture, block: Statistics, gamma: float, reg_covar: float) -> MStep:
    """One update of ``mixture`` from the sums over a block of rows at its parameters, in the data's units.

    Pure, and a function of its arguments alone: blocks in the same order give the same bits, whoever summed them.

    Parameters
    ----------
    gamma : float
        In (0, 1]: 1 is the EM update from the block alone.

    Raises
    ------
    NumericalError
        A statistic is not finite.
    """
    host = block.to("cpu")
    return m_step(mixed(implied_statistics(mixture, reg_covar, host.shift), host, gamma), reg_covar, mixture)


def mixed(past: Statistics, block: Statistics, gamma: float) -> Statistics:
    """(1 − γ) s + γ ŝ, times the block's rows, fp64; ``past`` is of one row. Both about the same shift.

    The block's likelihood, of the parameters before the update, is kept as it is.
    """
    weight = (1.0 - gamma) * block.n_rows
    return replace(block, **{name: weight * getattr(past, name) + gamma * getattr(block, name) for name in _MIXED})


def implied_statistics(mixture: Mixture, reg_covar: float, shift: Tensor) -> Statistics:
    """The expected statistics of one row under ``mixture``, about ``shift`` (D,), its regularisation taken out.

    The inverse of ``m_step``, but for components that it had to repair.
    """
    kind, d = mixture.covariance_type, mixture.n_features
    weights = torch.from_numpy(np.array(mixture.weights))
    delta = torch.from_numpy(np.array(mixture.means)) - shift
    own = torch.from_numpy(np.array(mixture.covariances))
    if kind == "full":
        i, j = torch.triu_indices(d, d)
        own = own[:, i, j] - reg_covar * (i == j).double()
        scatter = weights[:, None] * (own + delta[:, i] * delta[:, j])
    elif kind == "tied":
        within = own - reg_covar * torch.eye(d, dtype=torch.float64)
        scatter = weights.sum() * within + (weights[:, None] * delta).T @ delta
    elif kind == "diag":
        scatter = weights[:, None] * ((own - reg_covar).clamp(min=0) + delta**2)
    else:
        scatter = weights * (d * (own - reg_covar).clamp(min=0) + (delta**2).sum(1))
    zero = torch.zeros((), dtype=torch.float64)
    return Statistics(weights, weights[:, None] * delta, scatter, zero, zero + 1, shift, kind)
