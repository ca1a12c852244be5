"""A billion rows under a small limit, killed in the middle of a pass and resumed.

    python tools/bench_billion.py [--rows 1000000000] [--folder /tmp] [--device cuda] [--output FILE]

Writes ROWS × 32 uint8 to FOLDER (``.u8bin``, removed afterwards): clusters whose shares drift along the file, every row
different from every other, and the same for the same seed. Then, each by the command line in a process of its own,

* a fit (K = 1024, diag, ``--memory 4GiB --host-memory 16GiB``) that nobody disturbs;
* the same fit, which gets SIGKILL in the middle of a pass after the first, and is resumed;
* ``verify`` of the file against what the first pass of the first fit read, segment by segment.

Digests must be equal, and the mean of the model that of the rows, which a hole or a repeat would move. Prints a JSON
line; exits 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clustered import write

from streamgmm import Mixture

FEATURES = 32
_MEAN_TOLERANCE = 1e-4
"""Of a standard deviation; a block of 65,536 rows left out of 10⁹ from one end of the drift moves more."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "streamgmm", *map(str, arguments)]


def finished(arguments: list[str]) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: status {done.returncode}: {done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arguments[3]}: {facts.get('seconds', 0.0):.0f} s", file=sys.stderr, flush=True)
    return facts


def kill_in_a_later_pass(arguments: list[str], run: Path) -> float:
    """SIGKILL a quarter of the first pass's time after it; gives how many passes of training had been saved."""
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    history = run / "history.jsonl"
    while child.poll() is None and not (history.exists() and updates(run)):
        time.sleep(0.01)
    if child.poll() is not None:
        sys.exit("the run ended before it could be killed")
    time.sleep(0.25 * updates(run)[0]["update_seconds"])
    child.kill()
    child.wait()
    saved = finished(command("info", run, "--json"))
    return float(saved["n_iter"] + saved["cursor"] / saved["shape"][0])


def updates(run: Path) -> list[dict[str, Any]]:
    """What `history.jsonl` has of every update so far."""
    lines = (run / "history.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["iteration"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--components", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--host-memory", default="16GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="billion.", dir=arguments.folder))
    data, whole, broken = folder / "rows.u8bin", folder / "whole", folder / "broken"

    def fit(run: Path) -> list[str]:
        options = ("-k", arguments.components, "--covariance", "diag", "--max-iter", arguments.passes, "--tol", 0)
        limits = ("--memory", arguments.memory, "--host-memory", arguments.host_memory, "--device", arguments.device)
        return command("fit", data, *options, *limits, "--checkpoint-every", 1, "--output", run, "--json")

    try:
        begun = time.perf_counter()
        mean, deviation = write(data, arguments.rows, FEATURES, torch.uint8, torch.device(arguments.device))
        writing = time.perf_counter() - begun
        print(f"{writing:.0f} s to write", file=sys.stderr, flush=True)
        undisturbed = finished(fit(whole))
        saved = kill_in_a_later_pass(fit(broken), broken)
        resumed = finished(fit(broken))
        verified = finished(command("verify", data, "--against", whole, "--json"))
        mixture = Mixture.load(whole / "model.safetensors")
        error = float(np.abs((mixture.weights @ mixture.means - mean) / deviation).max())
        passes = [(record["update_seconds"], record["update_bytes"]) for record in updates(whole)]
    finally:
        shutil.rmtree(folder)
    same = undisturbed["digest"] == resumed["digest"] and undisturbed["lower_bound"] == resumed["lower_bound"]
    facts = {
        "data_bytes": arguments.rows * FEATURES,
        "seconds_writing": round(writing, 1),
        "undisturbed": undisturbed,
        "seconds_a_pass": [seconds for seconds, _ in passes],
        "gb_per_s_of_rows": [arguments.rows * FEATURES / seconds / 1e9 for seconds, _ in passes],
        "gb_per_s_read": [size / seconds / 1e9 for seconds, size in passes],
        "saved_when_killed": saved,
        "resumed_seconds": resumed["seconds"],
        "resumed_peak_host_bytes": resumed["peak_host_bytes"],
        "same_result": same,
        "mean_is_off_by_deviations": error,
        "verify": verified,
    }
    text = json.dumps(facts)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    return 0 if same and resumed["resumed"] and error < _MEAN_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
