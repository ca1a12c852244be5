"""Records as text for people."""

from __future__ import annotations

from typing import Any

from .errors import CONTRACT
from .session import Record


def bench_table(records: list[Record]) -> str:
    """One line a problem: ours for both stored types, then the peers' milliseconds."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in ("n", "k", "d", "data")), []).append(record)
    lines = [
        f"{'N K D':<16}{'data':<6}{'type':<10}{'mode':<5}{'fp32':>7}{'fp16':>7}{'queue':>7}{'floor':>7}{'share':>6}"
        f"{'live':>6}{'comp':>7}{'tiles':>6}{'nats':>8}{'stat':>8} | {'fl-gmm':>8}{'torch':>7}{'tf32':>7}"
    ]
    for (n, k, d, data), group in groups.items():
        size = f"{_short(n)} {_short(k)} {d}"
        for (kind, mode), pair in _ours(group).items():
            best = next((r for r in pair.values() if "ms" in r), None)
            wrong = next((r["verdict"] for r in pair.values() if r["verdict"] != "ok"), None)
            line = f"{size:<16}{data[:5]:<6}{kind:<10}{mode[:4]:<5}"
            line += "".join(f"{_ms(pair.get(stored)):>7}" for stored in ("float32", "float16"))
            if best is not None:
                line += f"{_digits(best.get('queued_ms')):>7}"
                line += f"{_digits(best.get('floor_ms')):>7}{_percent(best.get('share_of_floor')):>6}"
                line += f"{_percent(best['live_pairs']):>6}{best['live_components']:>7.1f}"
                line += f"{_percent(best['live_tiles']):>6}{best['error_nats']:>8.0e}{best['error_statistic']:>8.0e}"
            peers = {(r["implementation"], r["precision"]): r for r in group if r["covariance_type"] == kind}
            gmm = next((r for (name, _), r in peers.items() if name == "flash-gmm"), None)
            if mode == "medium":
                dense = "".join(f"{_ms(peers.get(('torch', name))):>7}" for name in ("float32", "tf32"))
                line += f" | {_ms(gmm):>8}{dense}"
            lines += [line.rstrip(), *([f"    {wrong}"] if wrong else [])]
        kmeans = [r for r in group if r["implementation"] == "flash-kmeans"]
        if kmeans:
            parts = "; ".join(f"{r['stored']} {_iteration(r)}" for r in kmeans)
            lines.append(f"{size:<16}{data[:5]:<6}flash-kmeans: {parts}")
    lines.append("milliseconds; queue: one of several passes that are waited for together, float32 rows")
    lines.append("* differs from fp64 by more than 0.05 nats or loses rows; ! failed")
    for r in records:
        if r["data"] == "realistic" and r["stored"] == "float32" and r.get("stages") and r["precision"] == "medium":
            longest = ", ".join(f"{name[:24]} {_digits(spent)}" for name, spent in list(r["stages"].items())[:5])
            lines.append(f"{_short(r['k'])} {r['d']} {r['covariance_type']}: {longest}")
    return "\n".join(lines)


def _iteration(record: Record) -> str:
    """Milliseconds of one iteration of k-means, and of its halves."""
    if "ms" not in record:
        return str(record["verdict"])
    halves = f"{_digits(record['assign_ms'])} + {_digits(record['update_ms'])}"
    return f"{_ms(record)} = {halves}, queued {_digits(record.get('queued_ms'))}"


def _ours(group: list[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Records by type and precision, then by stored type."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in group:
        if record["implementation"] == "streamgmm":
            found.setdefault((record["covariance_type"], record["precision"]), {})[record["stored"]] = record
    return found


def _short(count: int) -> str:
    return f"{count / 1e6:g}M" if count >= 100_000 else str(count)


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _ms(record: Record | None) -> str:
    if record is None:
        return "–"
    if "ms" in record:
        return _digits(record["ms"]) + ("" if record["verdict"] == "ok" else "*")
    return "skip" if record["verdict"].startswith("skipped") else "!"


def accuracy_table(records: list[Record]) -> str:
    lines = [f"{'type':<10}{'data':<33}{'scaling':<16}{'medium':<16}{'high':<16}auto"]
    for r in records:
        line = f"{r['covariance_type']:<10}{r['data']:<33}{r['scaling']:<16}"
        if "auto" in r:
            for precision in CONTRACT:
                line += f"{r[f'{precision}_nats']:.0e} {r[f'{precision}_statistic']:.0e}".ljust(16)
            line += r["auto"]
        lines.append(line + ("" if r["verdict"] == "ok" else f"  {r['verdict']}"))
    return "\n".join(lines)
