"""Results streamed into files, beside the pass of a fit over the same rows.

    python tools/bench_sinks.py [--device cpu|cuda] [--rows 4000000] [--features 64] [-k 64] [--dtype float32]
                                [--covariance diag] [--precision auto] [--rounds 3] [--folder /tmp]

Writes rows into FOLDER, fits three passes to them (on a CUDA device within 2 GiB, so that they stream), and calls the
commands as a user would: ``score``, ``score --per-row`` to .npy, ``predict`` to .npy, ``predict --proba --top 3`` to
.zarr. Rows stay in the page cache. Prints a JSON line each: the least of the seconds, rows and bytes of rows a second,
the process's CPU seconds, and the pass's seconds over these; and, on a CUDA device, the rate of the link alone.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from streamgmm.cli import main as streamgmm
from streamgmm.io.ceilings import pinned_rate

_ROWS_AT_ONCE = 1 << 20
_PASSES = 3


def write_rows(path: Path, n: int, d: int, k: int, dtype: str) -> None:
    """Rows of ``k`` overlapping clusters, a million of them again and again with other noise of one per cent."""
    rng = np.random.default_rng(0)
    means = 0.5 * rng.standard_normal((k, d), dtype=np.float32)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n, d))
    first = means[rng.integers(0, k, min(n, _ROWS_AT_ONCE))]
    first += rng.standard_normal(first.shape, dtype=np.float32)
    for start in range(0, n, _ROWS_AT_ONCE):
        some = first[: n - start]
        rows[start : start + len(some)] = some + 0.01 * rng.standard_normal(d, dtype=np.float32)
    rows.flush()


def called(*words: object) -> dict[str, object]:
    """What a command prints with ``--json``; raises RuntimeError where it fails."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            streamgmm([*map(str, words), "--json"])
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{words[0]} ended with status {ended.code}") from None
    return dict(json.loads(said.getvalue().splitlines()[-1]))


@contextmanager
def folder_in(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="bench_sinks_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("-k", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    size = asked.rows * asked.features * np.dtype(asked.dtype).itemsize
    on_gpu = torch.device(asked.device).type == "cuda"
    computing = ("--device", asked.device, "--precision", asked.precision)

    def tell(what: str, seconds: float, passing: float, cpu: float | None = None) -> None:
        figures = {"rows_per_second": asked.rows / seconds, "gb_per_second": size / seconds / 1e9}
        line = {"what": what, "seconds": seconds, **figures, "cpu_seconds": cpu, "of_the_pass": passing / seconds}
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in line.items()}), flush=True)

    with folder_in(asked.folder) as folder:
        data, run = folder / "x.npy", folder / "run"
        write_rows(data, asked.rows, asked.features, asked.k, asked.dtype)
        model = ("-k", asked.k, "--covariance", asked.covariance, "--init", "random_from_data", "--seed", 0)
        # Not what a later pass finds on the device: the commands read every row once.
        limit = ("--memory", "2GiB") if on_gpu else ()
        called("fit", data, *model, "--max-iter", _PASSES, "--tol", 0, "--output", run, *computing, *limit)
        history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        passing = min(record["update_seconds"] for record in history)
        tell(f"pass of fit ({history[-1]['precision']})", passing, passing)

        commands: dict[str, Callable[[int], dict[str, object]]] = {
            "score": lambda i: called("score", run, data, *computing),
            "score --per-row .npy": lambda i: called(
                "score", run, data, "--per-row", folder / "s.npy", "--overwrite", *computing
            ),
            "predict .npy": lambda i: called("predict", run, data, folder / "p.npy", "--overwrite", *computing),
            "predict --proba --top 3 .zarr": lambda i: called(
                "predict", run, data, folder / "p.zarr", "--proba", "--top", 3, "--overwrite", *computing
            ),
        }
        for what, command in commands.items():
            timed = []
            for i in range(asked.rounds):
                before = time.process_time()
                facts = command(i)
                timed.append((float(str(facts["seconds"])), time.process_time() - before))
            tell(what, min(timed)[0], passing, min(timed)[1])
        if on_gpu:
            rate = pinned_rate(torch.device(asked.device), 2.0)
            print(json.dumps({"what": "pinned memory to the device", "gb_per_second": round(rate / 1e9, 1)}))


if __name__ == "__main__":
    sys.exit(main())
