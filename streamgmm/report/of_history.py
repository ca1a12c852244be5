"""Pictures of how a mixture came about. A history is the records of ``history.jsonl``, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgmm.report.axes import Record, column, legend, marks, panels, percent, thinned, whole_numbers
from streamgmm.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS, _DASHES = ("blue", "orange", "green", "muted"), ("-", "--", ":")


def convergence(history: Sequence[Record]) -> Figure:
    """Lower bound, and its change, against iterations and against passes.

    One line a candidate, the best of each number of components strong; a fall of the bound has a red ring.
    """
    figure, axes = panels(2, 2, (11, 5.6), sharex="col", sharey="row")
    for records, style in _lines(history):
        for i, where in enumerate(("iteration", "n_passes")):
            x, bound, change = (column(records, key) for key in (where, "lower_bound", "change"))
            kept = thinned(len(x))
            axes[0, i].plot(x[kept], bound[kept], **marks(len(kept)), **style)
            kept = kept[np.isfinite(change[kept]) & (change[kept] != 0)]
            axes[1, i].plot(x[kept], np.abs(change[kept]), **marks(len(kept)), **style)
            fell = np.flatnonzero(change < 0)
            fell = fell[thinned(len(fell))]
            axes[1, i].plot(
                x[fell], -change[fell], "o", markersize=8, markerfacecolor="none", color=LIGHT["red"], zorder=4
            )
    for axis in axes[1]:
        axis.set_yscale("log")
    axes[0, 0].set(ylabel="lower bound (nats a row)")
    axes[1, 0].set(ylabel="change", xlabel="iteration")
    axes[1, 1].set(xlabel="passes over the data")
    whole_numbers(axes[1, 0])
    legend(axes[0, 1])
    return figure


def effective_components(history: Sequence[Record]) -> Figure:
    """exp of the entropy of the weights after each iteration, where the history holds it; lines as in `convergence`."""
    figure, axes = panels(1, 1, (5.5, 3.6))
    axis = axes[0, 0]
    for records, style in _lines([record for record in history if record.get("effective_components") is not None]):
        x, count = column(records, "iteration"), column(records, "effective_components")
        kept = thinned(len(x))
        axis.plot(x[kept], count[kept], **marks(len(kept)), **style)
    axis.set(xlabel="iteration", ylabel="effective components")
    whole_numbers(axis)
    legend(axis)
    return figure


def throughput(history: Sequence[Record]) -> Figure:
    """GB read a second in each update, and the share of its time that passed in waiting for data."""
    figure, axes = panels(2, 1, (5.5, 3.6), sharex="col", gridspec_kw={"height_ratios": (3, 1)})
    updates = _updates(history)
    seconds, size, waiting = (column(updates, f"update_{name}") for name in ("seconds", "bytes", "waiting"))
    edges = np.concatenate([[0.0], np.cumsum(seconds)])
    with np.errstate(divide="ignore", invalid="ignore"):
        rate, share = size / seconds / 1e9, np.clip(waiting / seconds, 0, 1)
    kept = thinned(len(updates))
    left = np.append(edges[:-1][kept], edges[-1])
    for axis, values, colour in ((axes[0, 0], rate, "blue"), (axes[1, 0], share, "orange")):
        axis.stairs(values[kept], left, baseline=0, color=LIGHT[colour], linewidth=1.5)
        axis.stairs(values[kept], left, baseline=0, color=LIGHT[colour], alpha=0.15, fill=True)
        axis.set_ylim(bottom=0)
    axes[0, 0].set(ylabel="GB/s")
    axes[1, 0].set(ylabel="waiting", xlabel="seconds of training", ylim=(0, 1), yticks=(0, 1))
    axes[1, 0].yaxis.set_major_formatter(percent())
    return figure


def _lines(history: Sequence[Record]) -> list[tuple[list[Record], dict[str, Any]]]:
    """Each candidate's records, and how its line looks: the best of each size are strong and labelled."""
    candidates: dict[object, list[Record]] = {}
    for record in history:
        if record.get("lower_bound") is not None:
            candidates.setdefault(record.get("candidate", 0), []).append(record)
    sizes: dict[object, list[list[Record]]] = {}
    for records in candidates.values():
        sizes.setdefault(records[-1].get("n_components"), []).append(records)
    lines = []
    for number, (size, group) in enumerate(sizes.items()):
        dashes, colour = divmod(number, len(_COLOURS))
        shared = {"color": LIGHT[_COLOURS[colour]], "linestyle": _DASHES[dashes % len(_DASHES)]}
        *others, best = sorted(group, key=lambda records: records[-1]["lower_bound"])
        lines += [(records, {**shared, "alpha": 0.35, "zorder": 2}) for records in others]
        label = {"label": f"{size} components"} if len(sizes) > 1 else {}
        lines.append((best, {**shared, **label, "zorder": 3}))
    return lines


def _updates(history: Sequence[Record]) -> list[Record]:
    """One record an update, whatever the number of candidates that took part in it."""
    found: dict[object, Record] = {}
    for record in history:
        if record.get("update_seconds") and record.get("update_bytes") is not None:
            found.setdefault(record["iteration"], record)
    return list(found.values())
