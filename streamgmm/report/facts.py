"""What a run's page tells in words and numbers, as HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from streamgmm.report.axes import Record
from streamgmm.report.records import RunRecord
from streamgmm.report.troubles import as_ranges, troubles
from streamgmm.units import format_bytes

_MOST_TROUBLES = 25


def how_it_ended(record: RunRecord) -> str:
    converged = record.result.get("converged")
    return "finished" if converged is None else "converged" if converged else "finished, not converged"


def tiles_of(record: RunRecord) -> str:
    mixture, result = record.mixture, record.result
    last: Record = record.best_history[-1] if record.best_history else {}
    shape = record.settings.get("shape")
    n_samples = result.get("n_samples") or (shape[0] if isinstance(shape, list) and shape else None)
    tiles: list[tuple[str, str, str]] = []
    if isinstance(n_samples, int):
        tiles.append(("rows", f"{n_samples:,}", f"of {mixture.n_features:,} feature{'s' * (mixture.n_features > 1)}"))
    tiles.append(("components", f"{mixture.n_components:,}", mixture.covariance_type))
    tiles.append(("effective components", f"{mixture.effective_components:,.1f}", "exp of the weights' entropy"))
    bound = result.get("lower_bound", last.get("lower_bound"))
    if isinstance(bound, (int, float)):
        tiles.append(("lower bound", f"{bound:,.4f}", "nats a row"))
    iterations, passes = result.get("n_iter", last.get("iteration")), result.get("n_passes", last.get("n_passes"))
    if isinstance(iterations, int) and isinstance(passes, (int, float)):
        tiles.append(("iterations", f"{iterations:,}", f"{passes:,.1f} passes over the data"))
    seconds, size = result.get("seconds"), result.get("bytes_streamed")
    if isinstance(seconds, (int, float)):
        rate = (
            f"{size / seconds / 1e9:.2f} GB/s" if isinstance(size, int) and size and seconds else "in the last process"
        )
        tiles.append(("time", _duration(seconds), rate))
    peak = result.get("peak_host_bytes")
    if isinstance(peak, int):
        device = result.get("peak_device_bytes")
        tiles.append(("peak memory", format_bytes(peak), f"{format_bytes(device)} on the device" if device else "host"))
    if isinstance(last.get("precision"), str):
        tiles.append(("precision", last["precision"], "of the last update"))
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def troubles_of(record: RunRecord) -> str:
    found = troubles(record.best_history)
    if not record.history:
        return '<p class="muted">No history was kept with this model.</p>'
    if not found:
        return '<p class="good">Nothing: no component was ever empty or degenerate.</p>'
    rows = [
        (str(t.component), t.what, as_ranges(t.iterations), "yes" if t.lasting else "no")
        for t in found[:_MOST_TROUBLES]
    ]
    more = f'<p class="muted">and {len(found) - len(rows):,} more</p>' if len(found) > len(rows) else ""
    return _table("troubles", rows, ("component", "what", "iterations", "still so at the end")) + more


def settings_of(record: RunRecord) -> str:
    rows = [(name, _value(name, value)) for name, value in sorted(record.settings.items())]
    if not rows:
        return '<p class="muted">No settings were kept with this model.</p>'
    return _table("settings", rows)


def _value(name: str, value: object) -> str:
    if name == "start" and isinstance(value, dict):
        given = [key for key, array in value.items() if array is not None]
        return f"given: {', '.join(given)}" if given else "not given"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _table(kind: str, rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"] if head else []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"
