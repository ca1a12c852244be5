"""Pass after pass over data larger than its memory limit: nothing may grow.

    python -m tools.soak --passes 200 [--output soak.jsonl]

Writes 192 MB (3 million rows of 16 float32), fits it under 96 MiB (on a GPU 160) with checkpoints after every pass, and
notes resident memory, open files and threads behind each. The first tenth is for warming up; what comes after it is
compared: the largest memory of the last tenth with the largest of the second, and the fewest files and threads. Exits 1
on growth. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from streamgmm.fitting import fit
from streamgmm.io.sources import open_source
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest

ROWS, FEATURES = 3_000_000, 16
LIMITS = {"cpu": 96 << 20, "cuda": 160 << 20}
"""Bytes, by kind of device: what a GPU needs for a fit leaves 160 MiB little for rows."""

ALLOWED_GROWTH = 2 << 20
"""An allocator's slack; a leak of one 4 KiB page a pass is already as much as this after 500."""


class Watch(Progress):
    """Notes what the process holds behind every update."""

    def __init__(self) -> None:
        self.records: list[dict[str, int]] = []

    def iteration(self, record: dict[str, object]) -> None:
        self.records.append(
            {
                "resident": resident_bytes(),
                "files": len(list(Path("/proc/self/fd").iterdir())),
                "threads": len(list(Path("/proc/self/task").iterdir())),
            }
        )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_rows(path: Path) -> None:
    """Piece by piece: rows that were in this process's memory would hide what the fit needs."""
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(ROWS, FEATURES))
    for start in range(0, ROWS, 100_000):
        piece = rng.standard_normal((100_000, FEATURES), dtype=np.float32)
        file[start : start + 100_000] = piece + rng.integers(0, 4, (100_000, 1)) * 3


def compared(records: list[dict[str, int]], name: str) -> tuple[int, int]:
    """What the second tenth and the last held: the most memory, but the fewest files and threads.

    What stays open is in every record after it; a file that is open for one record is no growth.
    """
    tenth, of = max(1, len(records) // 10), max if name == "resident" else min
    return (
        of(record[name] for record in records[tenth : 2 * tenth]),
        of(record[name] for record in records[-tenth:]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    watch, limit = Watch(), LIMITS[torch.device(arguments.device).type]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.npy"
        write_rows(path)
        source = open_source(path)
        request = FitRequest(
            n_components=4,
            covariance_type="diag",
            tol=0.0,
            max_iter=arguments.passes,
            init="random_from_data",
            device=arguments.device,
            memory_limit=limit,
            threads=2,
        )
        before, begun = resident_bytes(), time.perf_counter()
        result = fit(source, request, Path(name) / "run", watch)
        seconds = time.perf_counter() - begun
    grown = {name: compared(watch.records, name) for name in ("resident", "files", "threads")}
    facts = {
        "passes": len(watch.records),
        "n_passes": result.n_passes,
        "data_bytes": ROWS * FEATURES * 4,
        "memory_limit": limit,
        "resident_before": before,
        "seconds": round(seconds, 1),
        **{name: {"early": early, "late": late} for name, (early, late) in grown.items()},
    }
    print(json.dumps(facts))
    if arguments.output is not None:
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in watch.records))
    same = all(grown[name][0] == grown[name][1] for name in ("files", "threads"))
    return 0 if same and grown["resident"][1] <= grown["resident"][0] + ALLOWED_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
