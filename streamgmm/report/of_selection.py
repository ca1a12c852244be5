"""The picture that the number of components is chosen by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgmm.errors import RequestError
from streamgmm.report.axes import column, legend, panels
from streamgmm.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def selection(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Criteria against the number of components, each one's best marked.

    Parameters
    ----------
    table : list of dict
        One a model: ``n_components`` and any of ``bic``, ``aic`` (lower is better) and ``held_out`` (mean
        log-likelihood of held-out rows, nats; higher is better). A criterion that no model has is left out.
    """
    rows = sorted(table, key=lambda row: row["n_components"])
    if not rows:
        raise RequestError("table must hold at least one model; got none")
    criteria = [("bic", "BIC"), ("aic", "AIC")], [("held_out", "held-out log-likelihood (nats a row)")]
    present = [
        [(key, name) for key, name in group if any(row.get(key) is not None for row in rows)] for group in criteria
    ]
    groups = [group for group in present if group]
    if not groups:
        raise RequestError("table must hold bic, aic or held_out; it has none of them")
    figure, axes = panels(1, len(groups), (5.5 * len(groups), 3.6))
    for axis, group in zip(axes[0], groups, strict=True):
        for (key, name), colour in zip(group, ("blue", "orange"), strict=False):
            had = [row for row in rows if row.get(key) is not None]
            x, y = column(had, "n_components"), column(had, key)
            axis.plot(x, y, color=LIGHT[colour], marker="o", markersize=4, label=name)
            best = (np.nanargmax if key == "held_out" else np.nanargmin)(y)
            axis.plot(x[best], y[best], "o", markersize=11, markerfacecolor="none", color=LIGHT[colour])
        axis.set(xlabel="components", ylabel=" and ".join(name for _, name in group), xscale="log")
        chosen = np.unique(column(rows, "n_components"))
        if len(chosen) <= 8:
            axis.set_xticks(chosen, [f"{k:g}" for k in chosen])
            axis.minorticks_off()
        if len(group) > 1:
            legend(axis)
    return figure
