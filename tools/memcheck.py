"""Every kernel once on odd shapes, for compute-sanitizer to watch.

    python tools/memcheck.py --processes 12         # compiles into Triton's cache, and holds results against fp64
    compute-sanitizer --tool memcheck --error-exitcode 9 python tools/memcheck.py --unchecked
    TRITON_INTERPRET=1 python tools/memcheck.py --device cpu --only "diag high 13"          # without a GPU

Each tensor is an allocation of its own, so that what lies beyond its end belongs to nobody. Rows and components are
fewer than a tile or a little more than one, features an odd number of each shape class; one row lies far out, so that
its granule is taken again in wider forms. ``--unchecked`` leaves out the comparison with fp64, which only costs time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import numpy as np
import torch
from torch import Tensor

from streamgmm.frame import Frame, frame_of
from streamgmm.kernels import Kernel
from streamgmm.kernels.fused.configs import architecture_of
from streamgmm.kernels.fused.full_kernel import FullKernel
from streamgmm.kernels.fused.kernel import TritonKernel
from streamgmm.kernels.tiled import TiledKernel
from streamgmm.mixture import Mixture
from streamgmm.statistics import Statistics

TOLERANCE = {"medium": 2e-2, "high": 1e-4}
"""Relative error of statistics; rows are few, and one of them is far out."""


@dataclass(frozen=True)
class Case:
    covariance_type: str
    precision: str
    n_features: int
    n_components: int
    n_rows: int
    hard: bool

    def __str__(self) -> str:
        return " ".join(str(value) for value in astuple(self)[:-1]) + (" hard" if self.hard else "")


def cases() -> Iterator[Case]:
    """Every form × type × shape class, one tile of components and more, soft and hard."""
    for precision in ("medium", "high"):
        for kind in ("spherical", "diag", "tied"):
            for d, k, n in ((13, 3, 67), (130, 70, 1), (300, 131, 259)):
                for hard in (False, True):
                    yield Case(kind, precision, d, k, n, hard)
    # Three components are completed at once, seventeen are screened first.
    for d, k, n in ((13, 3, 67), (130, 3, 1), (70, 17, 259), (200, 17, 131)):
        yield Case("full", "medium", d, k, n, False)


def run(case: Case, device: torch.device, checked: bool) -> None:
    """Sums, weighted sums, likelihoods and rankings; one exception where they are wrong."""
    rows, mixture = draw(case, device)
    # A row is never its own frame: statistics about it would be zero, and no error relative to them finite.
    frame = frame_of(mixture.means, case.covariance_type)
    weights = torch.linspace(0, 2, len(rows), dtype=torch.float64, device=device)
    got = results(kernel_of(case, device), rows, weights, mixture, frame)
    if device.type == "cuda":
        torch.cuda.synchronize()
    if not checked:
        return
    exact = results(TiledKernel(torch.float64, hard=case.hard), rows, weights, mixture, frame)
    for name, value in got.items():
        error = float((value - exact[name]).norm() / exact[name].norm().clamp_min(1e-30))
        if not error <= TOLERANCE[case.precision]:
            raise ArithmeticError(f"{case}: {name} is off by {error:.1e}")


def kernel_of(case: Case, device: torch.device) -> Kernel:
    """Named here, as `select_kernel` would leave a device without CUDA to another kernel."""
    if case.covariance_type == "full":
        return FullKernel()
    return TritonKernel(case.precision, case.hard, architecture_of(device) if device.type == "cuda" else "hopper")


def results(kernel: Kernel, rows: Tensor, weights: Tensor, mixture: Mixture, frame: Frame) -> dict[str, Tensor]:
    """What every method of a kernel returns."""
    parameters = kernel.parameters(mixture, frame, rows.device)
    found = {
        "log p": kernel.log_likelihood(rows, parameters),
        "log p, ranked": kernel.top(rows, parameters, min(3, mixture.n_components)).log_likelihood,
    }
    for label, own in (("", None), (", weighted", weights)):
        origin = torch.zeros(mixture.n_features, dtype=torch.float64)
        sums = Statistics.zeros(mixture.covariance_type, mixture.n_components, origin, rows.device)
        kernel.accumulate(rows, parameters, sums, own)
        sums = kernel.finish(sums, parameters)
        found |= {f"{name}{label}": getattr(sums, name) for name in ("counts", "sums", "scatter", "n_rows")}
    return found


def draw(case: Case, device: torch.device) -> tuple[Tensor, Mixture]:
    """Float32 rows about well separated means, the last one far out where there are others."""
    rng = np.random.default_rng(0)
    k, d, n = case.n_components, case.n_features, case.n_rows
    means = 3 * rng.standard_normal((k, d))
    unit = {"spherical": np.ones(k), "diag": np.ones((k, d)), "tied": np.eye(d), "full": np.array([np.eye(d)] * k)}
    mixture = Mixture(np.full(k, 1 / k), means, unit[case.covariance_type], case.covariance_type)
    rows = means[rng.integers(0, k, n)] + rng.standard_normal((n, d))
    if n > 1:
        rows[-1] *= 1e3
    return torch.tensor(rows, dtype=torch.float32, device=device), mixture


def in_processes(count: int, arguments: list[str]) -> int:
    """This command ``count`` times, each with a share of the cases; the largest of their exit codes."""
    command = [sys.executable, __file__, *arguments]
    shares = [subprocess.Popen([*command, "--share", f"{i}/{count}"]) for i in range(count)]
    return max(abs(share.wait()) for share in shares)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="cases 'type precision D K N [hard]' that this finds"
    )
    parser.add_argument("--unchecked", action="store_true", help="no comparison with fp64")
    parser.add_argument("--processes", type=int, metavar="N", help="share the cases among N processes")
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes:
        passed_on = ["--device", arguments.device, "--only", arguments.only]
        return in_processes(arguments.processes, passed_on + ["--unchecked"] * arguments.unchecked)
    first, count = (int(part) for part in arguments.share.split("/"))
    chosen = [case for case in cases() if re.search(arguments.only, str(case))]
    if not chosen:
        parser.error(f"--only {arguments.only!r} finds no case")
    for case in chosen[first::count]:
        begun = time.perf_counter()
        run(case, torch.device(arguments.device), not arguments.unchecked)
        print(f"{case}: {time.perf_counter() - begun:.2f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
