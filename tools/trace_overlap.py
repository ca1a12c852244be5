"""Does the copy of chunk n+1 run under the kernel of chunk n? A profiler trace of a streamed fit, measured.

    python tools/trace_overlap.py [--rows 1000000] [--features 128] [--components 1024] [--trace trace.json]

Fits on a CUDA device from memory for a few passes, records every kernel and every host-to-device copy of rows, and
prints one JSON line: how much of the copying time lay under a running kernel, how many copies began before the kernel
of the chunk before them had ended, and the share of the time in which the device computed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from streamgmm.fitting import fit
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest

Interval = tuple[float, float]
_ROW_COPY_BYTES = 1 << 20


def merged(intervals: list[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same time."""
    result: list[Interval] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def overlap(a: list[Interval], b: list[Interval]) -> float:
    """Time that lies in both."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--components", type=int, default=1024)
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--chunk-rows", type=int, default=65_536)
    parser.add_argument("--trace", type=Path, help="Keep the trace (chrome://tracing, Perfetto) here.")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((arguments.components, arguments.features), dtype=np.float32)
    rows = rng.standard_normal((arguments.rows, arguments.features), dtype=np.float32)
    rows += centres[rng.integers(arguments.components, size=arguments.rows)]
    request = FitRequest(
        arguments.components,
        arguments.covariance,
        max_iter=3,
        tol=0.0,
        init="random_from_data",
        device="cuda",
        chunk_rows=arguments.chunk_rows,
    )
    source = ArraySource(rows)
    fit(source, request)  # compiles the kernels
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        result = fit(source, request)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.trace or Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [(e["ts"], e["ts"] + e["dur"]) for e in timed if e.get("cat") == "kernel"]
    copies = [
        (e["ts"], e["ts"] + e["dur"])
        for e in timed
        if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"] and e["args"].get("bytes", 0) >= _ROW_COPY_BYTES
    ]
    computing, copying = merged(kernels), merged(copies)
    span = max(end for _, end in computing + copying) - min(begin for begin, _ in computing + copying)
    under = sum(any(begin < end and b < finish for begin, finish in computing) for b, end in copies)
    copied = sum(end - begin for begin, end in copying)
    print(
        json.dumps(
            {
                **{key: value for key, value in vars(arguments).items() if key != "trace"},
                "device": torch.cuda.get_device_name(),
                "precision": result.history[-1]["precision"],
                "copies": len(copies),
                "copies_under_a_kernel": under,
                "copying_us": copied,
                "copying_under_kernels_share": overlap(computing, copying) / copied,
                "computing_share": sum(end - begin for begin, end in computing) / span,
                "span_us": span,
            }
        )
    )


if __name__ == "__main__":
    main()
