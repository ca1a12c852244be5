"""Rows a second of one process and of several, on the same data in the same run: what `torchrun` gains.

    python tools/bench_processes.py --processes 2 --device cpu
    python tools/bench_processes.py --processes 2 --device cuda --rows 20000000 --features 128 -k 4096

On a CPU every process computes with one thread, so that 1.0 a process is the best there can be. A pass is the time
between two updates in ``history.jsonl``; the first is left out. Sizes alternate, and the median of all passes counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_ONE_THREAD_EACH = "import os; os.cpu_count = lambda: {}; from streamgmm.cli import main; main()"


def make_rows(path: Path, n_samples: int, n_features: int) -> None:
    """Rows around 32 centres, float16, written piece by piece."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(32, n_features))
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n_samples, n_features))
    for start in range(0, n_samples, 1 << 18):
        rows = min(1 << 18, n_samples - start)
        out[start : start + rows] = centres[rng.integers(32, size=rows)] + rng.normal(size=(rows, n_features))


def run(processes: int, data: Path, run_folder: Path, arguments: argparse.Namespace) -> tuple[str, list[float]]:
    """The digest, and the seconds of each pass but the first."""
    script = run_folder.with_suffix(".py")
    script.write_text(_ONE_THREAD_EACH.format(processes) if arguments.device == "cpu" else _ONE_THREAD_EACH.format(16))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    fit = ["fit", data, "-k", arguments.components, "--covariance", arguments.covariance, "--device", arguments.device]
    fixed = ["--tol", 0, "--max-iter", arguments.passes, "--init", "random_from_data", "--output", run_folder, "--json"]
    command = [sys.executable, *launcher, script, *fit, *fixed, "--precision", arguments.precision]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    history = [json.loads(line) for line in (run_folder / "history.jsonl").read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1])["digest"], [line["update_seconds"] for line in history[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("-k", "--components", type=int, default=64)
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = (1, arguments.processes)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.npy"
        make_rows(data, arguments.rows, arguments.features)
        for turn in range(arguments.rounds):
            for size in sizes:
                digest, passes = run(size, data, Path(folder) / f"run-{size}-{turn}", arguments)
                digests.add(digest)
                seconds[size] += passes
    rates = {size: arguments.rows / statistics.median(passes) for size, passes in seconds.items()}
    best = {size: arguments.rows / min(passes) for size, passes in seconds.items()}
    facts = {
        **vars(arguments),
        "rows_per_second": rates,
        "best_rows_per_second": best,
        "ratio": rates[sizes[1]] / rates[1],
        "best_ratio": best[sizes[1]] / best[1],
        "same_digest": len(digests) == 1,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
