"""Held-out likelihood against passes, one panel for each data set and number of components."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from passes_bench.tables import Run

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(runs: list[Run], baseline: str, path: Path) -> None:
    """Nats below or above where ``baseline`` ends, every seed a line; bytes read are passes times the data's size."""
    names = list(dict.fromkeys(run["method"] for run in runs))
    sets = sorted({run["data"] for run in runs})
    sizes = sorted({run["k"] for run in runs})
    figure, panels = pyplot.subplots(
        len(sets), len(sizes), figsize=(4 * len(sizes), 2.6 * len(sets)), squeeze=False, layout="constrained"
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
                    panel.plot(range(1, len(gap) + 1), gap, color=f"C{number}", lw=1, label=run["method"])
            panel.axhline(0, color="grey", lw=0.5)
            panel.set(ylim=(-1, None), xscale="log", title=f"{data}, K = {k}", xlabel="passes", ylabel="nats")
    lines = {
        line.get_label(): line for panel in panels.flat for line in panel.get_lines() if line.get_label()[0] != "_"
    }
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)
