"""Does the copy of chunk n+1 run under the kernel of chunk n? A profiler trace of a streamed fit, measured.

    python tools/trace_overlap.py [--rows 16000000] [--features 128] [--components 4096] [--trace trace.json]

Fits on a CUDA device from host memory and records every kernel and every host-to-device copy of a chunk. Of the passes
after the first (which also checksums the rows) one JSON line tells: how many copies ran, in part at least, under a
kernel; how much of the copying time lay under kernels; and the share of the time in which the device computed.
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
from streamgmm.io.plan import plan_chunks
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest

Interval = tuple[float, float]
_DISTINCT_ROWS = 1_000_000


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
    parser.add_argument("--rows", type=int, default=16_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--components", type=int, default=4096)
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--trace", type=Path, help="Keep the trace (chrome://tracing, Perfetto) here.")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    distinct = min(arguments.rows, _DISTINCT_ROWS)
    centres = rng.standard_normal((arguments.components, arguments.features), dtype=np.float32)
    some = rng.standard_normal((distinct, arguments.features), dtype=np.float32)
    some += centres[rng.integers(arguments.components, size=distinct)]
    rows = np.tile(some.astype(arguments.dtype), (-(-arguments.rows // distinct), 1))[: arguments.rows]
    request = FitRequest(
        arguments.components,
        arguments.covariance,
        max_iter=arguments.passes,
        tol=0.0,
        init="random_from_data",
        device="cuda",
    )
    source = ArraySource(rows)
    fit(ArraySource(rows[: 1 << 20]), request)  # compiles the kernels
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        result = fit(source, request)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.trace or Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [(e["ts"], e["ts"] + e["dur"]) for e in timed if e.get("cat") == "kernel"]
    assert result.plan is not None
    spans = plan_chunks(arguments.rows, result.plan.chunk_rows)
    sizes = {span.rows * rows.itemsize * arguments.features for span in spans}
    chunks = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in timed
        if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"] and e["args"].get("bytes", 0) in sizes
    )
    copies = chunks[len(spans) : arguments.passes * len(spans)]
    begun, ended = copies[0][0], copies[-1][1]
    computing, copying = merged([k for k in kernels if begun <= k[0] and k[1] <= ended]), merged(copies)
    under = sum(overlap([copy], computing) > 0 for copy in copies)
    copied = sum(end - begin for begin, end in copying)
    print(
        json.dumps(
            {
                **{key: value for key, value in vars(arguments).items() if key != "trace"},
                "device": torch.cuda.get_device_name(),
                "precision": result.history[-1]["precision"],
                "chunk_rows": result.plan.chunk_rows,
                "copies": len(copies),
                "copies_under_a_kernel": under,
                "copying_under_kernels_share": overlap(computing, copying) / copied,
                "computing_share": sum(end - begin for begin, end in computing) / (ended - begun),
                "seconds_a_pass": (ended - begun) / 1e6 / (arguments.passes - 1),
                "gb_per_s": rows.nbytes * (arguments.passes - 1) / (ended - begun) / 1e3,
                "copy_gb_per_s": rows.nbytes * (arguments.passes - 1) / copied / 1e3,
            }
        )
    )


if __name__ == "__main__":
    main()
