"""The picture of an evaluation: recall over unique distance computations."""

from __future__ import annotations

from pathlib import Path

from streamgmm.ann.table import Evaluation
from streamgmm.errors import RequestError
from streamgmm.report.axes import panels
from streamgmm.storage import require_folder

_LEAST_RECALL = 0.7


def check_picture(path: str | Path) -> None:
    """Raise RequestError where `draw` could not write to ``path``: better before what is drawn is computed."""
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise RequestError(f"{path}: pictures are written to .svg, .png or .pdf; give the output one of these endings")
    require_folder(path)


def draw(evaluation: Evaluation, path: str | Path) -> None:
    """Write the picture to ``path`` (.svg, .png or .pdf).

    Raises
    ------
    RequestError
        matplotlib is missing, or the ending is unknown.
    """
    check_picture(path)
    figure, axes = panels(1, 1, (7.5, 4.5))
    axis = axes[0, 0]
    for number, row in enumerate(evaluation.rows):
        points = [point for point in row.curve if point[0] >= _LEAST_RECALL]
        # Missed recalls count as far as possible: log scale of what is missed shows the end that matters.
        missed = [1 - recall for recall, _ in points]
        style = "-" if "odds" in row.name else "--" if "posterior" in row.name else "-."
        axis.plot(
            [unique for _, unique in points], missed, style, color=f"C{number % 10}", label=row.name, linewidth=1.4
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.invert_yaxis()
    ticks = [0.3, 0.1, 0.05, 0.02, 0.01]
    axis.set_yticks(ticks, [f"{1 - tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("unique distance computations a query, centroids included")
    axis.set_ylabel(f"recall@{evaluation.k}")
    axis.legend(fontsize=7, loc="lower right", frameon=False)
    figure.savefig(path)
