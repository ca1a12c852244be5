"""Kill fits at random instants, resume them until they are done, and compare with runs that nobody disturbed.

    python -m tools.kill_harness --runs 19 --kills 120 [--device cuda] [--output kills.json]

Three kinds of instants: after a random time; at a random call of a random function of the package, so that one called
once (the last save) is hit as often as one called in every tile; and at, or just behind, a random system call on the
RUN folder (open, write, fsync, read, rename, unlink; needs gcc), so that the moment between a rename and the flush of
its folder is hit like any other. After every kill the run must be loadable; in the end digest, likelihood, passes and
history must be those of the undisturbed run. Exits 1 if any is not. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from tools.children import Children

SAME = ("digest", "lower_bound", "n_iter", "n_passes", "bytes_read", "converged")
SYSTEM_CALLS = ("open", "write", "fsync", "read", "rename", "unlink")


@dataclass(frozen=True)
class Case:
    """What one run fits, besides the data."""

    name: str
    data: str
    options: tuple[object, ...]


CASES = (
    Case("diag", "x.npy", ("-k", 8, "--max-iter", 6)),
    Case("full", "x.npy", ("-k", 4, "--covariance", "full", "--max-iter", 5)),
    Case("tied", "x.fbin", ("-k", 5, "--covariance", "tied", "--max-iter", 5)),
    Case("spherical", "x.zarr", ("-k", 7, "--covariance", "spherical", "--max-iter", 6)),
    Case("starts", "x.npy", ("-k", 3, "--n-init", 3, "--max-iter", 4)),
    Case("random", "x.npy", ("-k", 6, "--init", "random", "--max-iter", 5, "--seed", 7)),
    Case("highest", "x.npy", ("-k", 4, "--precision", "highest", "--max-iter", 4, "--threads", 1)),
    Case("small chunks", "x.npy", ("-k", 4, "--chunk-rows", 1024, "--max-iter", 3)),
    Case("every segment", "long.i8bin", ("-k", 3, "--chunk-rows", 65_536, "--max-iter", 3)),
    Case("little memory", "x.npy", ("-k", 8, "--memory", "160MiB", "--max-iter", 6)),
    Case("K = 1", "x.zarr", ("-k", 1, "--covariance", "full", "--max-iter", 3)),
    Case("k-means", "x.npy", ("-k", 6, "--model", "kmeans", "--max-iter", 6)),
    Case("several sizes", "x.npy", ("-k", "2,5", "--max-iter", 4)),
    Case("hold-out", "x.npy", ("-k", "2,4", "--holdout", 0.2, "--max-iter", 4)),
    Case("weights", "x.npy", ("-k", 4, "--weights", "weights.npy", "--max-iter", 5)),
    Case("skipped rows", "holes.npy", ("-k", 4, "--nonfinite", "skip", "--max-iter", 5)),
    Case("grown", "x.npy", ("-k", 2, "--split-to", 6, "--max-iter", 12)),
    Case("reseeded", "few.npy", ("-k", 20, "--collapse", "reseed", "--max-iter", 12)),
    Case("one row a pass", "few.npy", ("-k", 3, "--max-iter", 40)),
)


def write_data(folder: Path) -> None:
    """Small enough for a pass in a tenth of a second, large enough for several segments."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(8, 8))[rng.integers(8, size=200_000)] * 2 + rng.normal(size=(200_000, 8))).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "few.npy", x[:50])
    np.save(folder / "weights.npy", rng.random(len(x)))
    holes = x.copy()
    holes[rng.integers(len(x), size=500), 3] = np.nan
    np.save(folder / "holes.npy", holes)
    (folder / "x.fbin").write_bytes(np.array(x.shape, np.uint32).tobytes() + x.tobytes())
    array = zarr.create_array(
        folder / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(8192, 8), shards=(65_536, 8), compressors=None
    )
    array[:] = x
    # More than 64 blocks: every segment is filled, and the tree of sums is as deep as it gets.
    rows = rng.integers(-100, 100, size=(65 * 65_536 + 17, 2), dtype=np.int8)
    (folder / "long.i8bin").write_bytes(np.array(rows.shape, np.uint32).tobytes() + rows.tobytes())


class Harness:
    """Runs, kills and comparisons in one folder."""

    def __init__(self, children: Children, folder: Path, device: str, rng: random.Random) -> None:
        self._children, self._folder, self._device, self._rng = children, folder, device, rng
        self.killed: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def _command(self, case: Case, run: str) -> tuple[object, ...]:
        common = ("--tol", 0, "--device", self._device, "--checkpoint-every", 0, "--json", "--output", run)
        return ("fit", case.data, *case.options, *common)

    def run(self, case: Case, number: int, kills: int) -> list[str]:
        """What differs from the undisturbed run after about ``kills`` kills; nothing, if all is well."""
        whole, broken = f"whole-{number}", f"broken-{number}"
        counts, log = self._folder / "counts", self._folder / "log"
        log.unlink(missing_ok=True)
        watch = {"FAULT_PATH": f"{whole}/", "FAULT_LOG": log, "FAULT_CALLS": ",".join(SYSTEM_CALLS)}
        begun = time.perf_counter()
        undisturbed = self._children.run(
            *self._command(case, whole), cwd=self._folder, counts=counts, environment=watch
        )
        seconds = time.perf_counter() - begun
        if undisturbed.status != 0:
            return [f"{case.name}: the undisturbed run failed: {undisturbed.stderr}"]
        calls = json.loads(counts.read_text())
        lines = [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []
        for _ in range(kills):
            troubles, done = self._kill_once(case, broken, seconds, calls, Counter(lines))
            if troubles:
                return troubles
            if done:
                break
        return self._compare(case, whole, broken, undisturbed.json)

    def _kill_once(
        self, case: Case, run: str, seconds: float, calls: dict[str, int], system: Counter[str]
    ) -> tuple[list[str], bool]:
        kind = self._rng.choice(["time", "function", "system call"] if system else ["time", "function"])
        settings: dict[str, Any] = {}
        if kind == "time":
            settings["kill_after"] = self._rng.uniform(0, seconds)
            place = "time"
        elif kind == "function":
            place = self._rng.choice(sorted(calls))
            settings["at_call"] = (place, self._soon(calls[place]))
        else:
            place = self._rng.choice(sorted(system))
            moment = self._rng.choice(["kill", "after"])
            at = self._soon(system[place])
            settings["environment"] = {
                "FAULT_PATH": f"{run}/",
                "FAULT_CALLS": place,
                "FAULT_AT": at,
                "FAULT_KIND": moment,
            }
            place = f"{place} ({'before' if moment == 'kill' else 'behind'})"
        ended = self._children.run(*self._command(case, run), cwd=self._folder, **settings)
        if ended.status not in (0, -9):
            return [f"{case.name}: resumed, then status {ended.status}: {ended.stderr}"], True
        if ended.status == -9:
            self.killed[kind] += 1
            self.places[place] += 1
        if (self._folder / run / "config.json").exists():
            seen = self._children.run("info", run, "--json", cwd=self._folder)
            if seen.status != 0 or seen.stderr:
                return [f"{case.name}: not loadable after a kill at {place}: {seen.stderr}"], True
        return [], ended.status == 0

    def _soon(self, calls: int) -> int:
        """One of ``calls``, rather an early one: a resumed run makes fewer than a whole one."""
        return 1 + int(calls * self._rng.random() ** 3)

    def _compare(self, case: Case, whole: str, broken: str, undisturbed: dict[str, Any]) -> list[str]:
        done = self._children.run(*self._command(case, broken), cwd=self._folder)
        if done.status != 0:
            return [f"{case.name}: status {done.status}: {done.stderr}"]
        troubles = [
            f"{case.name}: {name} is {ours[name]!r}, undisturbed {theirs[name]!r}"
            for ours, theirs in zip(_models(done.json), _models(undisturbed), strict=True)
            for name in SAME
            if name in theirs and ours[name] != theirs[name]
        ]
        histories = [
            [(record["iteration"], record["candidate"], record["lower_bound"]) for record in map(json.loads, lines)]
            for lines in ((self._folder / run / "history.jsonl").read_text().splitlines() for run in (whole, broken))
        ]
        if histories[0] != histories[1]:
            troubles.append(f"{case.name}: the histories differ")
        left = [path.name for path in (self._folder / broken).rglob("*.tmp")]
        return troubles + [f"{case.name}: {name} was left behind" for name in left]


def _models(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of every model that a fit came to."""
    return [facts, *facts.get("models", [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(CASES))
    parser.add_argument("--kills", type=int, default=120, help="In all, at least.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    begun = time.perf_counter()
    troubles: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory() as name, Children() as children:
        write_data(Path(name))
        harness = Harness(children, Path(name), arguments.device, rng)
        share = -(-arguments.kills // arguments.runs)
        # A run may end before its share of kills; more runs then make up for it.
        while runs < arguments.runs or harness.killed.total() < arguments.kills:
            case = CASES[runs % len(CASES)]
            before = harness.killed.total()
            troubles += harness.run(case, runs, share)
            runs += 1
            print(f"{case.name:<16} {harness.killed.total() - before:>3} kills", file=sys.stderr, flush=True)
    facts = {
        "device": arguments.device,
        "runs": runs,
        "kills": harness.killed.total(),
        "kinds": dict(harness.killed),
        "distinct_places": len(harness.places),
        "same_result": runs - len({trouble.split(":")[0] for trouble in troubles}),
        "troubles": troubles,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(facts))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**facts, "places": dict(harness.places)}, indent=1))
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
