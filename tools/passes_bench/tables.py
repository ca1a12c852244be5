"""Markdown tables of the runs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

TOLERANCE = 0.01
"""Nats below the baseline that count as having reached it."""

Run = dict[str, Any]

_PROBLEM = ("data", "n", "d", "covariance", "k")


def tables(runs: list[Run], baseline: str) -> str:
    """A table of differences from ``baseline``, a row a problem with a number a seed, and how often each reached it."""
    problems: dict[tuple[Any, ...], dict[str, Run]] = defaultdict(dict)
    for run in runs:
        problems[_problem(run)][run["method"]] = run
    problems = {key: found for key, found in sorted(problems.items()) if baseline in found}
    names = [name for name in dict.fromkeys(run["method"] for run in runs) if name != baseline]
    rows: dict[tuple[Any, ...], list[dict[str, Run]]] = defaultdict(list)
    for key, found in problems.items():
        rows[key[:-1]].append(found)
    lines = [_row("data", "N", "D", "covariance", "K", baseline, *names), _row(*["---"] * (6 + len(names)))]
    for key, seeds in rows.items():
        cells = [
            " / ".join(f"{_gap(found, name, baseline):+.3f}" for found in seeds if name in found) for name in names
        ]
        lines.append(_row(*key, " / ".join(f"{found[baseline]['curve'][-1]:.3f}" for found in seeds), *cells))
    within = f"within {TOLERANCE} of {baseline}, or better"
    lines += ["", _row("method", "passes", within, "worst", "median"), _row(*["---"] * 5)]
    for name in names:
        ran = [found for found in problems.values() if name in found]
        gaps = sorted(_gap(found, name, baseline) for found in ran)
        reached = f"{sum(gap >= -TOLERANCE for gap in gaps)} of {len(gaps)}"
        most = max(found[name]["passes"] for found in ran)
        lines.append(_row(name, f"{most:.2f}", reached, f"{gaps[0]:+.3f}", f"{gaps[len(gaps) // 2]:+.3f}"))
    return "\n".join(lines)


def first_passes(runs: list[Run], method: str) -> list[Run]:
    """Runs of ``method`` cut off where the others on the same problem ended: after as many passes."""
    ends = {_problem(run): run["passes"] for run in runs if run["method"] != method}
    cut = []
    for run in runs:
        if run["method"] == method and _problem(run) in ends:
            # A sample may miss a few of the rows at the ends of the data: it is a pass less some rows.
            kept = sum(rows <= ends[_problem(run)] + 0.01 for rows in run["rows"])
            some = {"passes": run["rows"][kept - 1], "rows": run["rows"][:kept], "curve": run["curve"][:kept]}
            cut.append({**run, **some, "method": f"{method}, as many passes"})
    return cut


def _gap(found: dict[str, Run], name: str, baseline: str) -> float:
    return float(found[name]["curve"][-1] - found[baseline]["curve"][-1])


def _problem(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in (*_PROBLEM, "seed"))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
