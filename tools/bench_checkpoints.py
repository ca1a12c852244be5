"""What checkpoints cost: on the way of the run, and beside it.

    python -m tools.bench_checkpoints [--device cuda] [--output checkpoints.jsonl]

Fits with a checkpoint after every chunk and times each: ``stop_ms``, which the run waits for (copying the sums under
way and handing them over), and ``beside_ms``, processor time of the thread that writes, reads back and renames.
``share_of_the_run`` is both over the default interval of 60 s. Times are processor time, so a busy machine does not
change them; on a GPU ``stop_ms`` is wall time, because the copy waits for the device. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from streamgmm.checkpoint import Checkpoints
from streamgmm.fitting import fit
from streamgmm.io.sources import open_source
from streamgmm.request import FitRequest

INTERVAL_S = 60.0
SHAPES = ((64, 64, "diag"), (1024, 128, "diag"), (1024, 128, "spherical"), (4096, 768, "diag"), (64, 128, "full"))
ROWS = 20_000


def timed(clock: Callable[[], float], into: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any) -> Any:
        begun = clock()
        try:
            return function(*arguments)
        finally:
            into.append(clock() - begun)

    return wrapper


def measure(k: int, d: int, kind: str, device: str) -> dict[str, object]:
    rows = np.random.default_rng(0).standard_normal((ROWS, d), dtype=np.float32)
    stops: list[float] = []
    beside: list[float] = []
    save, write = Checkpoints.save, Checkpoints._write_newest
    clock = time.perf_counter if device.startswith("cuda") else time.thread_time
    Checkpoints.save = timed(clock, stops, save)  # type: ignore[method-assign]
    Checkpoints._write_newest = timed(time.thread_time, beside, write)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as name:
            np.save(Path(name) / "x.npy", rows)
            request = FitRequest(
                n_components=k,
                covariance_type=kind,
                max_iter=2,
                tol=0.0,
                init="random_from_data",
                chunk_rows=4096,
                checkpoint_every=0.0,
                device=device,
            )
            fit(open_source(Path(name) / "x.npy"), request, Path(name) / "run")
            sizes = [path.stat().st_size for path in (Path(name) / "run" / "checkpoints").glob("*.safetensors")]
    finally:
        Checkpoints.save, Checkpoints._write_newest = save, write  # type: ignore[method-assign]
    stop, work = median(stops), max(beside)
    return {
        "n_components": k,
        "n_features": d,
        "covariance_type": kind,
        "device": device,
        "checkpoints": len(stops),
        "bytes": max(sizes),
        "stop_ms": round(1e3 * stop, 3),
        "beside_ms": round(1e3 * work, 1),
        "share_of_the_run": round((stop + work) / INTERVAL_S, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = []
    for shape in SHAPES:
        lines.append(json.dumps(measure(*shape, arguments.device)))
        print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
