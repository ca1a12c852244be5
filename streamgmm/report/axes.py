"""Axes in the theme, and what all pictures do alike. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgmm.errors import RequestError
from streamgmm.mixture import Float64Array
from streamgmm.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""One line of ``history.jsonl``."""

MOST_POINTS = 1000
"""A line of more points looks the same and takes more room."""


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, (rows, columns), in the theme."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("pictures need matplotlib; install streamgmm[plot]") from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.ravel():
        axis.set_axisbelow(True)
        axis.grid(color=LIGHT["line"], linewidth=0.8)
        axis.tick_params(which="both", color=LIGHT["line"], labelcolor=LIGHT["muted"])
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set_color(LIGHT["ink"])
        for side, spine in axis.spines.items():
            spine.set_color(LIGHT["line"])
            spine.set_visible(side in ("left", "bottom"))
        axis.patch.set_alpha(0)
    return figure, axes


def column(records: Sequence[Record], name: str) -> Float64Array:
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def thinned(count: int) -> np.ndarray:
    """Indices of at most `MOST_POINTS` of ``count`` points, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, MOST_POINTS)).round().astype(np.int64))


def marks(count: int) -> dict[str, Any]:
    """Single points need a mark; a crowd of them is a line."""
    return {"marker": "o" if count <= 60 else "", "markersize": 3.5 if count <= 30 else 2.5, "linewidth": 1.6}


def legend(axis: Axes) -> None:
    """Names of the lines that have one, where there are any."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, labelcolor=LIGHT["ink"])


def whole_numbers(axis: Axes, name: str = "x") -> None:
    from matplotlib.ticker import MaxNLocator

    getattr(axis, f"{name}axis").set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0)
