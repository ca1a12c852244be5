"""EM on a CPU beside scikit-learn: same rows, same start, same number of iterations, turn by turn.

    python tools/bench_peers.py                                  # digits to 200,000 × 32, every covariance type
    python tools/bench_peers.py --shapes 1000000x32x256 --dtype float32 --rounds 3 --iterations 3 --cpu
    python tools/bench_peers.py --own-start                      # k-means included, as by default
    python tools/bench_peers.py --memory --shapes 1000000x32x256 # growth of a process above imports and input

A shape is ROWSxFEATURESxCOMPONENTS. Correctness first: both must reach the same lower bound. Then rounds of A, B, A,
B …; the ratio of each round is independent of a machine whose speed drifts. Prints a line a case and one JSON line for
each. With --own-start each begins as it does by itself, from k-means, and that is timed too; the bounds then differ.

--cpu counts the processor's seconds of all threads instead of the clock's, and gives BLAS one thread, as others burn
them waiting: on a busy machine only that is fair. With --memory each library fits in a process of its own; growth is
its largest resident size less that before the fit, when everything was imported, the rows were there, and a small fit
had loaded what is loaded late.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Peer
from threadpoolctl import threadpool_limits

from streamgmm import GaussianMixture

TYPES = ("full", "tied", "diag", "spherical")
_SETTLING = 0.25
"""Seconds before each fit: the threads of the BLAS that the one before used go on spinning for 0.2."""

MAKERS = {"streamgmm": GaussianMixture, "scikit-learn": Peer}


@dataclass(frozen=True)
class Case:
    rows: int
    features: int
    components: int
    covariance: str
    dtype: str
    iterations: int
    own_start: bool = False

    def data(self) -> np.ndarray:
        """Handwritten digits where the shape is theirs, else overlapping clusters."""
        digits = load_digits().data
        if (self.rows, self.features) == digits.shape:
            return (digits / 16).astype(self.dtype)
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(self.components, self.features)).astype(self.dtype)
        x = rng.standard_normal((self.rows, self.features), dtype=self.dtype)
        for start in range(0, self.rows, 65_536):
            part = x[start : start + 65_536]
            part += centres[rng.integers(self.components, size=len(part))]
        return x

    def estimators(self, x: np.ndarray) -> dict[str, Peer | GaussianMixture]:
        """Both, with the same parameters to start from, or each with those that it finds by k-means."""
        common = {"covariance_type": self.covariance, "tol": 0.0, "random_state": 0, "reg_covar": 1e-3}
        if self.own_start:
            common["max_iter"] = self.iterations
            ours = GaussianMixture(self.components, device="cpu", **common)
            return {"streamgmm": ours, "scikit-learn": Peer(self.components, **common)}
        start = GaussianMixture(self.components, max_iter=0, device="cpu", **common).fit(x)
        given = {
            "weights_init": start.weights_,
            "means_init": start.means_,
            "precisions_init": start.precisions_,
            # The given parameters replace what this computes; it is the cheapest start both offer.
            "init_params": "random_from_data",
            "max_iter": self.iterations,
        }
        ours = GaussianMixture(self.components, device="cpu", **common, **given)
        return {"streamgmm": ours, "scikit-learn": Peer(self.components, **common, **given)}


def timed(estimator: Peer | GaussianMixture, x: np.ndarray, clock: Callable[[], float]) -> float:
    time.sleep(_SETTLING)
    begun = clock()
    estimator.fit(x)
    return clock() - begun


def compare(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """Medians of seconds and of ratios, after a round that only warms up and checks that both do the same work."""
    x = case.data()
    ours, peer = case.estimators(x).values()
    timed(ours, x, clock), timed(peer, x, clock)
    difference = abs(float(ours.lower_bound_) - float(peer.lower_bound_))
    assert ours.n_iter_ == peer.n_iter_ == case.iterations
    assert case.own_start or difference < 1e-3 * max(1.0, abs(float(peer.lower_bound_))), (
        f"lower bounds differ by {difference}"
    )
    pairs = [(timed(ours, x, clock), timed(peer, x, clock)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    return {
        **asdict(case),
        "lower_bound": float(ours.lower_bound_),
        "lower_bound_difference": difference,
        "streamgmm_seconds": statistics.median(a for a, _ in pairs),
        "scikit_learn_seconds": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def growth(case: Case, name: str) -> int:
    """Bytes by which this process grows while ``name`` fits."""
    x = case.data()
    small = x[: max(1000, 2 * case.components)]
    MAKERS[name](2, covariance_type=case.covariance, random_state=0, reg_covar=1e-3).fit(small)
    estimator = case.estimators(small)[name]
    before = resident_bytes()
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")  # the peak begins again from here
    estimator.fit(x)
    with open("/proc/self/status") as file:  # noqa: PTH123
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return max(0, peak - before)


def memory(case: Case) -> dict[str, object]:
    """Growth of each library, in processes of their own."""
    found = {}
    for name in MAKERS:
        command = [sys.executable, __file__, "--child", name, json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{name}_bytes"] = int(done.stdout.splitlines()[-1])
    return {**asdict(case), **found, "ratio": found["scikit-learn_bytes"] / max(1, found["streamgmm_bytes"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1797x64x16", "20000x32x16", "200000x32x64"])
    parser.add_argument("--covariance", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-start", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    if arguments.child:
        name, case = arguments.child
        print(growth(Case(**json.loads(case)), name))
        return
    print(f"scikit-learn {sklearn.__version__}, {os.cpu_count()} cores", flush=True)
    with threadpool_limits(1) if arguments.cpu else nullcontext():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    clock = time.process_time if arguments.cpu else time.perf_counter
    for shape in arguments.shapes:
        for dtype in arguments.dtype:
            for covariance in arguments.covariance:
                case = Case(*map(int, shape.split("x")), covariance, dtype, arguments.iterations, arguments.own_start)
                facts = memory(case) if arguments.memory else compare(case, arguments.rounds, clock)
                if arguments.memory:
                    grown = [f"{name} {facts[f'{name}_bytes'] / 2**20:,.0f} MiB" for name in MAKERS]
                    print(f"{shape} {dtype} {covariance:<10}{', '.join(grown)}, ratio {facts['ratio']:.1f}", flush=True)
                else:
                    print(
                        f"{shape} {dtype} {covariance:<10}streamgmm {facts['streamgmm_seconds']:.3f} s, scikit-learn "
                        f"{facts['scikit_learn_seconds']:.3f} s, ratio {facts['ratio_median']:.2f} "
                        f"({facts['ratio_min']:.2f} to {facts['ratio_max']:.2f})",
                        flush=True,
                    )
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
