"""Growth of memory under a limit: the same `fit` on a 512 MB Zarr array and on a 1,000-row one.

    python tools/measure_memory.py [--rows 2000000] [--memory 128MiB]

Prints one JSON line: peak resident bytes of both processes, their difference, and the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import zarr

from streamgmm.units import parse_bytes

FEATURES, COMPONENTS = 64, 64


def write(path: Path, rows: int) -> None:
    """A sharded Zarr v3 array of ``rows`` clustered float32 rows."""
    chunk = min(rows, 16_384)
    array = zarr.create_array(
        path, shape=(rows, FEATURES), dtype=np.float32, chunks=(chunk, FEATURES), shards=(chunk * 4, FEATURES)
    )
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(COMPONENTS, FEATURES)).astype(np.float32)
    for start in range(0, rows, 4 * chunk):
        n = min(4 * chunk, rows - start)
        noise = rng.normal(size=(n, FEATURES)).astype(np.float32)
        array[start : start + n] = centres[rng.integers(COMPONENTS, size=n)] + noise


def peak(data: Path, memory: str, iterations: int) -> dict[str, object]:
    """The JSON of a fit in its own process."""
    command = [sys.executable, "-m", "streamgmm", "fit", str(data), "-k", str(COMPONENTS), "--covariance", "diag"]
    command += ["--device", "cpu", "--memory", memory, "--max-iter", str(iterations), "--tol", "0", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--memory", default="128MiB")
    parser.add_argument("--iterations", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.zarr", Path(folder) / "large.zarr"
        write(small, 1000)
        write(large, arguments.rows)
        before = int(str(peak(small, arguments.memory, arguments.iterations)["peak_host_bytes"]))
        facts = peak(large, arguments.memory, arguments.iterations)
    after = int(str(facts["peak_host_bytes"]))
    print(
        json.dumps(
            {
                "rows": arguments.rows,
                "array_bytes": arguments.rows * FEATURES * 4,
                "limit": parse_bytes(arguments.memory),
                "peak_small": before,
                "peak_large": after,
                "growth": after - before,
                "seconds": facts["seconds"],
                "within": after - before <= parse_bytes(arguments.memory),
            }
        )
    )


if __name__ == "__main__":
    main()
