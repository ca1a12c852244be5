"""Held-out likelihood against passes and bytes read, one panel for each data set and number of components."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from passes_bench.tables import Run

matplotlib.use("Agg")
from matplotlib import pyplot

_LOWEST = -1.0


def plot(runs: list[Run], baseline: str, path: Path) -> None:
    """Nats below or above where ``baseline`` ends, every seed a line; passes below the panel, gigabytes above."""
    names = list(dict.fromkeys(run["method"] for run in runs))
    sets = list(dict.fromkeys(run["data"] for run in runs))
    sizes = sorted({run["k"] for run in runs})
    figure, panels = pyplot.subplots(
        len(sets), len(sizes), figsize=(2.9 * len(sizes), 2.1 * len(sets)), squeeze=False, layout="constrained"
    )
    for i, data in enumerate(sets):
        for j, k in enumerate(sizes):
            panel = panels[i, j]
            here = [run for run in runs if run["data"] == data and run["k"] == k]
            ends = {run["seed"]: run["curve"][-1] for run in here if run["method"] == baseline}
            for run in here:
                if run["seed"] in ends:
                    gap = [value - ends[run["seed"]] for value in run["curve"]]
                    number = names.index(run["method"])
                    panel.plot(run["rows"], gap, f"C{number}.-", lw=0.8, ms=2, label=run["method"])
            panel.axhline(0, color="grey", lw=0.5)
            panel.set(ylim=(_LOWEST, None), xscale="log", title=f"{data}, K = {k}")
            panel.set_xticks([1, 2, 5, 10, 31], labels=["1", "2", "5", "10", "31"], minor=False)
            panel.minorticks_off()
            if here:
                gigabytes = here[0]["n"] * here[0]["d"] * 4 / 1e9
                above = panel.secondary_xaxis(
                    "top", functions=(lambda x, g=gigabytes: x * g, lambda x, g=gigabytes: x / g)
                )
                ticks = [p * gigabytes for p in (1, 5, 31)]
                above.set_xticks(ticks, labels=[f"{tick:.2g} GB" for tick in ticks], fontsize="x-small")
                above.minorticks_off()
    lines = {
        line.get_label(): line for panel in panels.flat for line in panel.get_lines() if line.get_label()[0] != "_"
    }
    figure.supxlabel("passes over the data, everything read counted")
    figure.supylabel("held-out nats a row, less those of 30 full-batch passes")
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=80)
