"""EM on a CPU beside scikit-learn: same rows, same start, same number of iterations, turn by turn.

    python tools/bench_peers.py [--rows 200000] [--features 64] [--components 64] [--covariance diag]

Correctness first: both must reach the same lower bound. Then rounds of A, B, A, B …; the ratio of each round is
independent of a machine whose speed drifts. Prints a line a round and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Peer

from streamgmm import GaussianMixture


def problem(rows: int, features: int, components: int) -> np.ndarray:
    """Overlapping clusters, float32."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(components, features)) * 1.0
    return (centres[rng.integers(components, size=rows)] + rng.normal(size=(rows, features))).astype(np.float32)


def timed(estimator: Peer | GaussianMixture, x: np.ndarray) -> float:
    begun = time.perf_counter()
    estimator.fit(x)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--covariance", default="diag")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    x = problem(arguments.rows, arguments.features, arguments.components)
    common = {"covariance_type": arguments.covariance, "tol": 0.0, "random_state": 0}
    start = GaussianMixture(arguments.components, max_iter=0, device="cpu", **common).fit(x)
    given = {
        "weights_init": start.weights_.astype(np.float32),
        "means_init": start.means_.astype(np.float32),
        "precisions_init": start.precisions_.astype(np.float32),
        # The given parameters replace what this computes; it is the cheapest start both offer.
        "init_params": "random_from_data",
        "max_iter": arguments.iterations,
    }
    ours = GaussianMixture(arguments.components, device="cpu", **common, **given)
    peer = Peer(arguments.components, **common, **given)
    ratios, our_times, peer_times = [], [], []
    for i in range(arguments.rounds + 1):
        a, b = timed(ours, x), timed(peer, x)
        if i == 0:  # warm-up, and the check that both did the same work
            difference = abs(float(ours.lower_bound_) - float(peer.lower_bound_))
            assert ours.n_iter_ == peer.n_iter_ == arguments.iterations
            assert difference < 1e-3, f"lower bounds differ by {difference}"
            continue
        ratios.append(b / a)
        our_times.append(a)
        peer_times.append(b)
        print(f"round {i}: streamgmm {a:.2f} s, scikit-learn {b:.2f} s, ratio {b / a:.2f}")
    print(
        json.dumps(
            {
                **vars(arguments),
                "scikit_learn": sklearn.__version__,
                "cores": os.cpu_count(),
                "lower_bound_difference": difference,
                "streamgmm_seconds": statistics.median(our_times),
                "scikit_learn_seconds": statistics.median(peer_times),
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    )


if __name__ == "__main__":
    main()
