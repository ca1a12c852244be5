"""What a fit gives: the models, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from streamgmm.checkpoint import History
from streamgmm.evaluation import Evaluation
from streamgmm.memory import MemoryPlan
from streamgmm.mixture import Mixture
from streamgmm.steps.kmeans import inertia


@dataclass(frozen=True, eq=False)
class FittedModel:
    """One size's best candidate.

    Attributes
    ----------
    mixture : Mixture
    lower_bounds : tuple of float
        Mean log-likelihood before each update, nats a sample.
    converged : bool
    n_rows : float
        Weight of the training rows; 0 before the first update.
    evaluation : Evaluation or None
        Of the final parameters; made where several sizes are compared or rows are held out.
    hard : bool
        Whether it is k-means.
    """

    mixture: Mixture
    lower_bounds: tuple[float, ...]
    converged: bool
    n_rows: float = 0.0
    evaluation: Evaluation | None = None
    hard: bool = False

    @property
    def n_iter(self) -> int:
        return len(self.lower_bounds)

    @property
    def lower_bound(self) -> float | None:
        return self.lower_bounds[-1] if self.lower_bounds else None

    @property
    def held_out(self) -> float | None:
        """Mean log-likelihood of the held-out rows, nats a sample."""
        return None if self.evaluation is None else self.evaluation.held_out

    @property
    def inertia(self) -> float | None:
        """Sum over the rows of the squared distance to the nearest centre, before the last update; of k-means alone."""
        if not self.hard or self.lower_bound is None:
            return None
        return inertia(self.mixture, self.lower_bound) * self.n_rows

    def criterion(self, name: str) -> float | None:
        """``bic``, ``aic`` or ``held_out``, each so that lower is better; None where it is not known."""
        if name == "held_out":
            return None if self.held_out is None else -self.held_out
        if self.evaluation is None:
            return None
        n, free = self.evaluation.n_rows, self.mixture.n_parameters
        return -2 * self.evaluation.log_likelihood * n + free * (log(n) if name == "bic" else 2.0)

    def summary(self) -> dict[str, object]:
        """The facts about this model that ``fit --json`` prints."""
        mixture, facts = self.mixture, dict[str, object]()
        if self.evaluation is not None:
            facts |= {"log_likelihood": self.evaluation.log_likelihood, "held_out": self.held_out}
            facts |= {name: self.criterion(name) for name in ("bic", "aic")}
        if self.hard:
            facts |= {"model": "kmeans", "inertia": self.inertia}
        return {
            "n_features": mixture.n_features,
            "n_components": mixture.n_components,
            "covariance_type": mixture.covariance_type,
            "n_iter": self.n_iter,
            "converged": self.converged,
            "lower_bound": self.lower_bound,
            **facts,
            "digest": mixture.digest,
        }

    def details(self) -> dict[str, object]:
        """What `from_details` needs besides the mixture, JSON values."""
        return {
            "lower_bounds": list(self.lower_bounds),
            "converged": self.converged,
            "n_rows": self.n_rows,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
            "hard": self.hard,
        }

    @classmethod
    def from_details(cls, mixture: Mixture, details: Mapping[str, Any]) -> FittedModel:
        """The inverse of `details`."""
        found = details.get("evaluation")
        return cls(
            mixture,
            tuple(details["lower_bounds"]),
            bool(details["converged"]),
            float(details.get("n_rows", 0.0)),
            None if found is None else Evaluation(**found),
            bool(details.get("hard", False)),
        )


@dataclass(frozen=True, eq=False)
class FitResult:
    """The models and how they came about.

    Attributes
    ----------
    models : tuple of FittedModel
        One for each number of components asked for, in that order.
    best : int
        Which of them the criterion prefers.
    all_converged : bool
        Whether no other start is left that a larger ``max_iter`` would go on with.
    bytes_read : int
        Since the beginning of the run; an interrupted run's earlier passes are included.
    bytes_streamed : int
        By all processes of the last call, in passes; ``seconds`` too is of that call.
    bytes_copied : int
        To devices, by all processes of that call.
    bottleneck : str
        What set the pace of the passes where waiting was longest: ``disk``, ``decode``, ``link`` or ``kernel``.
    hit_rates : dict
        Shares of all processes' rows that came from ``device``, ``host``, ``page_cache`` and ``disk``.
    resumed : bool
        Whether a checkpoint, or a finished run, was taken up.
    seconds_waiting : float
        Time that the process which waited longest stood waiting for data.
    skipped : int
        Rows left out because they are not finite.
    peak_device_bytes, peak_host_bytes : int
        Of the process that has most.
    history : tuple of dict
        One record an iteration and candidate.
    plan : MemoryPlan or None
        None when the run was finished already.
    algorithm : str
        ``em`` or ``stepwise``.
    why : str
        In a line, how it came to that; empty where nothing was to be decided.
    n_processes : int
        That fitted together.
    """

    models: tuple[FittedModel, ...]
    best: int
    all_converged: bool
    n_samples: int
    n_passes: float
    seconds: float
    seconds_waiting: float
    bytes_read: int
    bytes_streamed: int
    bytes_copied: int
    bottleneck: str
    hit_rates: dict[str, float]
    resumed: bool
    skipped: int
    peak_host_bytes: int
    peak_device_bytes: int
    history: History
    plan: MemoryPlan | None
    algorithm: str = "em"
    why: str = ""
    n_processes: int = 1

    @property
    def model(self) -> FittedModel:
        """The best model."""
        return self.models[self.best]

    @property
    def mixture(self) -> Mixture:
        return self.model.mixture

    @property
    def lower_bounds(self) -> tuple[float, ...]:
        return self.model.lower_bounds

    @property
    def converged(self) -> bool:
        return self.model.converged

    @property
    def n_iter(self) -> int:
        return self.model.n_iter

    def facts(self) -> dict[str, object]:
        """What is true of the run as a whole, JSON values."""
        return {
            "n_samples": self.n_samples,
            "n_passes": self.n_passes,
            "seconds": self.seconds,
            "seconds_waiting": self.seconds_waiting,
            "bytes_read": self.bytes_read,
            "bytes_streamed": self.bytes_streamed,
            "bytes_copied": self.bytes_copied,
            "read_rate": self.bytes_streamed / max(self.seconds, 1e-9) / 1e9,
            "copy_rate": self.bytes_copied / max(self.seconds, 1e-9) / 1e9,
            "kernel_share": max(0.0, 1.0 - self.seconds_waiting / max(self.seconds, 1e-9)),
            "bottleneck": self.bottleneck,
            "hit_rates": self.hit_rates,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "skipped": self.skipped,
            "resumed": self.resumed,
            "algorithm": self.algorithm,
            "why": self.why,
            "n_processes": self.n_processes,
        }

    def summary(self) -> dict[str, object]:
        """The facts that ``fit --json`` prints: the best model's, and every model's where there are several."""
        facts = {**self.facts(), **self.model.summary()}
        if len(self.models) > 1:
            facts |= {"models": [model.summary() for model in self.models], "best": self.model.summary()}
        return facts


def best_model(models: Sequence[FittedModel], criterion: str) -> int:
    """Index of the model that ``criterion`` prefers; the first where nothing tells them apart."""
    values = [model.criterion(criterion) for model in models]
    return min(range(len(models)), key=lambda i: (values[i] is None, values[i] or 0.0))


def comparison(models: Sequence[FittedModel], best: int) -> list[str]:
    """A table of sizes and criteria, a line a model, for people."""
    lines = [f"{'components':>12}{'log-likelihood':>16}{'held out':>12}{'BIC':>16}{'AIC':>16}{'iterations':>12}"]
    for i, model in enumerate(models):
        likelihood = None if model.evaluation is None else model.evaluation.log_likelihood
        cells = (
            f"{model.mixture.n_components:>12}",
            _cell(likelihood, ".4f", 16),
            _cell(model.held_out, ".4f", 12),
            *(_cell(model.criterion(name), ".7g", 16) for name in ("bic", "aic")),
            f"{model.n_iter:>12}",
            "  ← best" if i == best else "",
        )
        lines.append("".join(cells))
    return lines


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'–' if value is None else format(value, form):>{width}}"
