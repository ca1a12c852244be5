"""Several sizes on the same passes against one: what a read that is shared saves.

    python tools/bench_selection.py --rate 100MB --rows 1000000 --features 32 --sizes 4,8,16,32 --passes 5

Rows come from a file at no more than ``--rate`` bytes a second, as from a network drive, so that reading is what
limits. Both fits make the same number of passes, in turns; the comparison also pays for its evaluation pass. Prints one
JSON line.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from threading import Lock

import click
import numpy as np

from streamgmm.fitting import fit
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Rows, Source
from streamgmm.request import FitRequest
from streamgmm.units import parse_bytes


class Slow(Source):
    """Another source's rows, delivered at no more than ``rate`` bytes a second in all."""

    read_path = "extents"

    def __init__(self, source: Source, rate: float) -> None:
        self._source, self._rate = source, rate
        self.name, self.shape, self.dtype = source.name, source.shape, source.dtype
        self._lock, self._free_at = Lock(), 0.0

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        self._source.read_into(start, stop, out)
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + out.nbytes / self._rate
            ready = self._free_at
        time.sleep(max(0.0, ready - time.monotonic()))


@click.command()
@click.option("--rate", default="100MB", show_default=True, help="Bytes a second that the storage gives.")
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--features", default=32, show_default=True)
@click.option("--sizes", default="4,8,16,32", show_default=True)
@click.option("--passes", default=5, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(rate: str, rows: int, features: int, sizes: str, passes: int, rounds: int, device: str) -> None:
    """Time one size and several, in turns."""
    several = tuple(int(k) for k in sizes.split(","))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.npy")
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(max(several), features)) * 3
        rows_of = centres[rng.integers(len(centres), size=rows)] + rng.normal(size=(rows, features))
        np.save(path, rows_of.astype(np.float32))
        del rows_of

        def seconds(wanted: tuple[int, ...]) -> tuple[float, float]:
            source = Slow(open_source(path), parse_bytes(rate, "--rate"))
            request = FitRequest(wanted, "diag", max_iter=passes, tol=0.0, init="random_from_data", device=device)
            begun = time.perf_counter()
            result = fit(source, request)
            return time.perf_counter() - begun, result.n_passes

        times: dict[str, list[float]] = {"one": [], "several": []}
        read: dict[str, float] = {}
        for _ in range(rounds):
            for name, wanted in (("one", (max(several),)), ("several", several)):
                taken, read[name] = seconds(wanted)
                times[name].append(taken)
    one, more = (statistics.median(times[name]) for name in ("one", "several"))
    facts = {"seconds_one": one, "seconds_several": more, "ratio": more / one, "passes": read}
    facts["ratio_a_pass"] = more / read["several"] / (one / read["one"])
    print(json.dumps({"sizes": several, "rows": rows, "features": features, "rate": rate, "device": device, **facts}))


if __name__ == "__main__":
    main()
