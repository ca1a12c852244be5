"""From raw vectors to their labels: `prepare`, a fit of what it made, `predict` on the raw vectors; the times, as JSON.

    python tools/bench_pipeline.py                                           # GPU: 20M × 64 float32, K = 1024
    python tools/bench_pipeline.py --rows 400000 --features 32 --pca 16 -k 32    # a CPU

The raw vectors (``.fbin``, float32) are clustered, correlated, far from zero, and sorted by cluster. Four commands
follow, each as a person would type it, in a process of its own: times include starting Python. At the end the labels of
raw vectors are compared with those of the prepared rows, row by row. The last line of stdout is one JSON object; exit
status 1 where labels differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PIECE = 1 << 18
CLUSTERS = 512


def write_rows(path: Path, n: int, d: int, cores: int) -> None:
    """Rows around centres in a space of d/2 dimensions, turned into d correlated features, plus noise."""
    rng = np.random.default_rng(0)
    latent = max(2, d // 2)
    centres = (3 * rng.standard_normal((CLUSTERS, latent))).astype(np.float32)
    turn = (rng.standard_normal((latent, d)) * np.linspace(2, 0.5, latent)[:, None]).astype(np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<II", n, d))
        file.truncate(8 + 4 * n * d)

    def piece(start: int) -> None:
        rng, rows = np.random.default_rng([1, start]), min(PIECE, n - start)
        x = centres[(start + np.arange(rows)) * CLUSTERS // n]
        x = (x + rng.standard_normal((rows, latent), dtype=np.float32)) @ turn
        x += 0.3 * rng.standard_normal((rows, d), dtype=np.float32) + 20
        with path.open("r+b") as file:
            file.seek(8 + 4 * start * d)
            file.write(x.data)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(piece, range(0, n, PIECE)))


def command(*arguments: object) -> dict[str, Any]:
    """What ``streamgmm … --json`` prints last, with the seconds and the peak memory of the process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    told = [sys.executable, "-m", "streamgmm", *map(str, arguments), "--json"]
    print("$ streamgmm", *map(str, arguments), flush=True)
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(told, env=environment, stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"streamgmm {arguments[0]} ended with status {process.returncode}")
        out.seek(0)
        facts = json.loads(out.read().splitlines()[-1])
    seconds = time.perf_counter() - begun
    print(f"  {seconds:.1f} s, peak memory {used.ru_maxrss / 2**20:.2f} GiB", flush=True)
    return {**facts, "command_seconds": seconds, "command_peak_host_bytes": used.ru_maxrss * 1024}


def different_labels(raw: Path, prepared: Path, ids: Path) -> int:
    """How many rows got another label as a raw vector than as a prepared row."""
    import zarr

    of_raw, of_prepared = np.load(raw, mmap_mode="r"), np.load(prepared, mmap_mode="r")
    numbers = np.asarray(zarr.open_array(ids, mode="r")[:])
    return int((of_raw[numbers] != of_prepared).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--pca", type=int, default=32, metavar="D")
    parser.add_argument("-k", "--components", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", default="16GiB", help="of prepare")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--output", type=Path, help="Write the JSON object there too.")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    folder = Path(tempfile.mkdtemp(prefix="streamgmm-pipeline-", dir=arguments.folder))
    try:
        raw, prepared, run = folder / "raw.fbin", folder / "rows.zarr", folder / "run"
        begun = time.perf_counter()
        write_rows(raw, arguments.rows, arguments.features, cores)
        size = raw.stat().st_size
        print(f"{arguments.rows:,} × {arguments.features} float32, {size / 1e9:.2f} GB, {cores} cores", flush=True)
        made = {"write": time.perf_counter() - begun}
        steps = f"standardise,pca={arguments.pca}"
        to_shards = ["--steps", steps, "--dtype", "float16", "--shuffle", "--ids", "--memory", arguments.memory]
        stages = {"prepare": command("prepare", raw, prepared, *to_shards)}
        fixed = ["--max-iter", arguments.iterations, "--tol", 0, "--device", arguments.device]
        stages["fit"] = command("fit", prepared, "-k", arguments.components, "--output", run, *fixed)
        on_device = ["--device", arguments.device]
        stages["predict raw"] = command("predict", run, raw, folder / "raw.npy", *on_device)
        stages["predict prepared"] = command("predict", run, prepared, folder / "prepared.npy", *on_device)
        different = different_labels(folder / "raw.npy", folder / "prepared.npy", folder / "rows.ids.zarr")
        history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = {
        "rows": arguments.rows,
        "features": arguments.features,
        "pca": arguments.pca,
        "n_components": arguments.components,
        "raw_bytes": size,
        "cores": cores,
        "seconds": {**made, **{name: found["command_seconds"] for name, found in stages.items()}},
        "peak_host_bytes": {name: found["command_peak_host_bytes"] for name, found in stages.items()},
        "peak_device_bytes": stages["fit"]["peak_device_bytes"],
        "prepare_stages": stages["prepare"]["stages"],
        "prepare_workers": stages["prepare"]["workers"],
        "n_iter": stages["fit"]["n_iter"],
        "pass_seconds": [line["update_seconds"] for line in history],
        "lower_bound": stages["fit"]["lower_bound"],
        "digest": stages["fit"]["digest"],
        "different_labels": different,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(facts) + "\n")
    print(json.dumps(facts))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
