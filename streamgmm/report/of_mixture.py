"""Pictures of a mixture's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streamgmm.mixture import Float64Array, Mixture
from streamgmm.report.axes import MOST_POINTS, marks, panels, thinned, whole_numbers
from streamgmm.report.geometry import principal_plane, spectra
from streamgmm.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ELLIPSES = 500


def weights(mixture: Mixture) -> Figure:
    """The weights, heaviest first, on a logarithmic scale, beside the weight that all would have if they were equal."""
    figure, axes = panels(1, 1, (5.5, 3.6))
    axis = axes[0, 0]
    ordered = np.sort(mixture.weights)[::-1]
    rank = np.arange(1, len(ordered) + 1)
    kept = thinned(len(ordered))
    kept = kept[ordered[kept] > 0]
    axis.axhline(1 / len(ordered), color=LIGHT["muted"], linestyle="--", linewidth=1)
    axis.plot(rank[kept], ordered[kept], color=LIGHT["blue"], **marks(len(kept)))
    if len(kept):
        axis.fill_between(rank[kept], ordered[kept], ordered[kept].min() / 2, color=LIGHT["blue"], alpha=0.12)
    axis.set(xlabel="component, heaviest first", ylabel="weight", yscale="log")
    whole_numbers(axis)
    return figure


def condition_numbers(mixture: Mixture) -> Figure:
    """Histogram of the covariances' condition numbers (largest over smallest eigenvalue).

    One covariance has one such number, and a spherical one always has 1: a tied covariance is shown by its eigenvalues,
    spherical ones by their standard deviations.
    """
    figure, axes = panels(1, 1, (5.5, 3.6))
    axis = axes[0, 0]
    found = spectra(mixture)
    if mixture.covariance_type == "tied":
        eigenvalues = found.eigenvalues[0, ::-1]
        kept = thinned(len(eigenvalues))
        kept = kept[eigenvalues[kept] > 0]
        axis.plot(kept + 1, eigenvalues[kept], color=LIGHT["green"], **marks(len(kept)))
        axis.set(xlabel="direction, widest first", ylabel="variance (eigenvalue)", yscale="log")
        whole_numbers(axis)
        return figure
    spherical = mixture.covariance_type == "spherical"
    values = np.sqrt(np.maximum(found.eigenvalues[:, 0], 0)) if spherical else found.condition_numbers
    _log_histogram(axis, values)
    axis.set(xlabel="standard deviation" if spherical else "condition number", ylabel="components")
    return figure


def projection(mixture: Mixture) -> Figure:
    """Means and 1σ ellipses in the plane that shows most of the weighted scatter of the means; area is weight.

    Of many components only the heaviest have an ellipse. In one dimension, the density.
    """
    figure, axes = panels(1, 1, (11, 6.2))
    axis = axes[0, 0]
    if mixture.n_features == 1:
        _density(axis, mixture)
        return figure
    from matplotlib.collections import EllipseCollection

    plane = principal_plane(mixture)
    heaviest = np.argsort(-mixture.weights, kind="stable")
    many = len(heaviest) > MOST_ELLIPSES
    drawn = heaviest[:MOST_ELLIPSES]
    values, vectors = np.linalg.eigh(plane.covariances[drawn])
    deviations = np.sqrt(np.maximum(values, 0))
    angles = np.degrees(np.arctan2(vectors[:, 1, 1], vectors[:, 0, 1]))
    places = plane.means[drawn]
    strength = float(np.clip(3 / np.sqrt(len(drawn)), 0.15, 0.8))
    for face, edge, alpha in ((LIGHT["blue"], "none", strength / 5), ("none", LIGHT["blue"], strength)):
        ellipses = EllipseCollection(
            2 * deviations[:, 1],
            2 * deviations[:, 0],
            angles,
            units="xy",
            offsets=places,
            offset_transform=axis.transData,
            facecolors=face,
            edgecolors=edge,
            linewidths=0.8,
            alpha=alpha,
        )
        axis.add_collection(ellipses)
    # In points², as matplotlib has it: smaller dots in a crowd, and none so small that it cannot be seen.
    area = np.maximum(mixture.weights / mixture.weights.max() * np.clip(3000 / len(heaviest), 12, 160), 2)
    axis.scatter(*plane.means.T, s=area, color=LIGHT["orange"], alpha=0.75, linewidths=0, rasterized=many)
    # The extent of each ellipse, so that all are in view; equal units, so that circles are circles.
    reach = np.sqrt(np.maximum(np.diagonal(plane.covariances[drawn], axis1=1, axis2=2), 0))
    axis.update_datalim(np.concatenate([places - reach, places + reach, plane.means]))
    axis.set_aspect("equal", adjustable="datalim")
    axis.autoscale_view()
    axis.set(**{f"{name}label": _direction(i, plane.share[i]) for i, name in enumerate("xy")})
    return figure


def _log_histogram(axis: Axes, values: Float64Array) -> None:
    finite = values[np.isfinite(values) & (values > 0)]
    if len(finite):
        low, high = np.log10(finite.min()), np.log10(finite.max())
        if high - low < 0.1:
            low, high = (low + high) / 2 - 0.05, (low + high) / 2 + 0.05
        edges = np.logspace(low, high, int(np.clip(2 * np.sqrt(len(finite)), 5, 60)) + 1)
        # Rounding must not leave the extremes outside.
        edges[0], edges[-1] = min(edges[0], finite.min()), max(edges[-1], finite.max())
        counts, _ = np.histogram(finite, edges)
        axis.stairs(counts, edges, fill=True, color=LIGHT["green"], alpha=0.75)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    whole_numbers(axis, "y")


def _density(axis: Axes, mixture: Mixture) -> None:
    """p(x) of a mixture in one dimension, and each component's part of it."""
    means = mixture.means[:, 0]
    variances = np.broadcast_to(mixture.covariances.reshape(-1), means.shape)
    deviations = np.sqrt(np.maximum(variances, np.finfo(np.float64).tiny))
    heaviest = np.argsort(-mixture.weights, kind="stable")[:100]
    low, high = (means - 4 * deviations).min(), (means + 4 * deviations).max()
    # Evenly spread points, and some about each component: narrow ones would fall between them.
    about = means[heaviest, None] + deviations[heaviest, None] * np.linspace(-4, 4, 21)
    x = np.unique(np.concatenate([np.linspace(low, high, MOST_POINTS), about.ravel()]))
    total = np.zeros(len(x))
    for weight, mean, deviation in zip(mixture.weights, means, deviations, strict=True):
        total += weight / (deviation * np.sqrt(2 * np.pi)) * np.exp(-0.5 * ((x - mean) / deviation) ** 2)
    axis.fill_between(x, total, color=LIGHT["blue"], alpha=0.12)
    axis.plot(x, total, color=LIGHT["blue"], linewidth=1.6)
    for k in heaviest:
        own = means[k] + deviations[k] * np.linspace(-4, 4, 61)
        part = mixture.weights[k] / (deviations[k] * np.sqrt(2 * np.pi)) * np.exp(-0.5 * np.linspace(-4, 4, 61) ** 2)
        axis.plot(own, part, color=LIGHT["orange"], linewidth=0.8, alpha=0.7)
    axis.set(xlabel="x", ylabel="density", ylim=(0, None))


def _direction(number: int, share: float) -> str:
    name = f"direction {number + 1}"
    return name if np.isnan(share) else f"{name} ({share:.0%} of the scatter of the means)"
