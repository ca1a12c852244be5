"""What a run did and what it found: pictures as matplotlib figures, and one page that holds them all.

Needs matplotlib (``pip install streamgmm[plot]``) only when a picture is drawn.
"""

from streamgmm.report.of_history import convergence, effective_components, throughput
from streamgmm.report.of_mixture import condition_numbers, projection, weights
from streamgmm.report.of_selection import selection
from streamgmm.report.page import render, write_report
from streamgmm.report.records import RunRecord, read_run

__all__ = [
    "RunRecord",
    "condition_numbers",
    "convergence",
    "effective_components",
    "projection",
    "read_run",
    "render",
    "selection",
    "throughput",
    "weights",
    "write_report",
]
