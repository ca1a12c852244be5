"""Every picture of a run, and what it shows in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streamgmm.report import of_history, of_mixture, of_selection
from streamgmm.report.axes import Record
from streamgmm.report.geometry import spectra
from streamgmm.report.of_mixture import MOST_ELLIPSES
from streamgmm.report.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure, what it is called, and what it shows in words."""

    name: str
    title: str
    figure: Figure
    alt: str
    caption: str
    wide: bool = False


def pictures_of(record: RunRecord) -> list[Picture]:
    """Every picture that there is something to draw of, in the order of the page."""
    makers = (_convergence, _selection, _projection, _weights, _shape, _effective, _throughput)
    return [picture for make in makers if (picture := make(record)) is not None]


def _convergence(record: RunRecord) -> Picture | None:
    history: Sequence[Record] = record.best_history
    if not history:
        return None
    first, last = history[0], history[-1]
    return Picture(
        "convergence",
        "Convergence",
        of_history.convergence(record.history),
        f"Lower bound and its change against iterations and passes. The lower bound went from "
        f"{first['lower_bound']:.4f} to {last['lower_bound']:.4f} nats in {last['iteration']} updates.",
        "Mean log-likelihood of the parameters before each update, and how much it changed. "
        "A red ring is a fall: full-batch EM has none unless components were split, repaired or floored. "
        "Fainter lines are other starts.",
        wide=True,
    )


def _selection(record: RunRecord) -> Picture | None:
    if not any(model.get(name) is not None for model in record.models for name in ("bic", "aic", "held_out")):
        return None
    sizes = ", ".join(str(model.get("n_components")) for model in record.models)
    return Picture(
        "selection",
        "Number of components",
        of_selection.selection(record.models),
        f"Criteria for models of {sizes} components; the one of {record.mixture.n_components} components was chosen.",
        "BIC and AIC are better where they are lower, the log-likelihood of held-out rows where it is higher; "
        "rings mark each one's best.",
        wide=True,
    )


def _projection(record: RunRecord) -> Picture:
    mixture = record.mixture
    k, d = mixture.n_components, mixture.n_features
    if d == 1:
        alt = f"Density of the mixture of {k} components in one dimension, and of its parts."
        caption = "The density, and each component's part of it."
    else:
        alt = f"Means of {k} components in {d} dimensions, projected on a plane, with ellipses of their covariances."
        caption = (
            "The plane that holds most of the weighted scatter of the means. Dots have the area of their weight; "
            "ellipses are one standard deviation wide."
        )
        caption += f" Only the {MOST_ELLIPSES} heaviest have one." if k > MOST_ELLIPSES else ""
    return Picture("projection", "Components", of_mixture.projection(mixture), alt, caption, wide=True)


def _shape(record: RunRecord) -> Picture:
    mixture = record.mixture
    figure = of_mixture.condition_numbers(mixture)
    kind = mixture.covariance_type
    if kind == "spherical":
        deviations = np.sqrt(np.maximum(mixture.covariances, 0))
        alt = f"Histogram of {len(deviations)} standard deviations, {deviations.min():.3g} to {deviations.max():.3g}."
        caption = "A spherical covariance has condition number 1: what differs is its standard deviation."
        return Picture("conditions", "Standard deviations", figure, alt, caption)
    found = spectra(mixture)
    conditions = found.condition_numbers
    finite = conditions[np.isfinite(conditions)]
    largest = f"{finite.max():.3g}" if len(finite) else "infinite"
    if kind == "tied":
        alt = f"Eigenvalues of the tied covariance in descending order; its condition number is {largest}."
        caption = f"The one covariance that all components share; its condition number is {largest}."
        return Picture("conditions", "Spectrum", figure, alt, caption)
    alt = f"Histogram of the condition numbers of {len(conditions)} covariances; the largest is {largest}."
    caption = "Largest over smallest eigenvalue of each covariance: far to the right lie nearly flat components."
    if len(conditions) < mixture.n_components:
        caption += f" Of the {len(conditions):,} heaviest."
    if len(finite) < len(conditions):
        caption += f" Not shown: {len(conditions) - len(finite):,} that are singular."
    return Picture("conditions", "Condition numbers", figure, alt, caption)


def _weights(record: RunRecord) -> Picture:
    mixture = record.mixture
    weights, k = mixture.weights, mixture.n_components
    weightless = int((weights == 0).sum())
    return Picture(
        "weights",
        "Weights",
        of_mixture.weights(mixture),
        f"Weights in descending order, from {weights.max():.3g} down to {weights.min():.3g}; "
        f"{mixture.effective_components:.1f} of {k} components are effective.",
        f"Dashed: 1/{k:,}, the weight of each if all were equal."
        + (f" Not shown: {weightless:,} without any weight." if weightless else ""),
    )


def _effective(record: RunRecord) -> Picture | None:
    counts = [line["effective_components"] for line in _held(record, "effective_components")]
    if not counts:
        return None
    k = record.mixture.n_components
    return Picture(
        "effective",
        "Effective components",
        of_history.effective_components(record.history),
        f"exp of the entropy of the weights after each iteration: {counts[0]:.1f} at first, {counts[-1]:.1f} at last, "
        f"of {k}.",
        f"exp of the entropy of the weights: {k:,} if all were equal, 1 if one had everything.",
    )


def _throughput(record: RunRecord) -> Picture | None:
    timed = [line for line in _held(record, "update_bytes") if line.get("update_seconds")]
    if not timed:
        return None
    fields = ("update_seconds", "update_bytes", "update_waiting")
    seconds, size, waiting = (sum(line.get(name) or 0 for line in timed) for name in fields)
    return Picture(
        "throughput",
        "Throughput",
        of_history.throughput(record.history),
        f"Rate of reading in each update: {size / seconds / 1e9:.2f} GB/s on average, "
        f"{waiting / seconds:.0%} of the time spent waiting for data.",
        "Bytes of data streamed a second, and below the share of the time that computing waited for them. "
        "Where that is high, storage is the bottleneck.",
    )


def _held(record: RunRecord, name: str) -> list[Record]:
    """The lines of the best history that have the field ``name``."""
    return [line for line in record.best_history if line.get(name) is not None]
