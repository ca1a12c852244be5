"""What the compiler makes of every Triton kernel, without a GPU: registers, shared memory, spills, tensor-core work.

    python tools/compile_report.py [--target hopper|sm_86|...] [--features 128 ...] [--every] [--only NAME] [--json]

The host code runs, and what it would launch is compiled instead, so that tiles, types and constants are the real ones.
``hopper`` has tiles of its own; any other target gets those that fit 99 KiB, which is what sm_86, sm_89 and sm_120
have. Without ``--every`` the report covers sums of unweighted float32 rows and, for the first of the features, the
ranking of components; with it also weights, hard assignment, exponents, likelihoods alone and every stored type. It
must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial

from compiled.binaries import Binary, compiled
from compiled.cases import Case, cases, launches_of
from compiled.launches import Launch

FEATURES = (13, 64, 128, 256, 768)
HOPPER = 90


def target_of(name: str) -> tuple[str, int]:
    """The tiles' architecture and the compute capability that ``name`` means."""
    if name == "hopper":
        return "hopper", HOPPER
    if not name.startswith("sm_") or not name[3:].isdigit():
        raise argparse.ArgumentTypeError(f"{name!r} is no target; use hopper, or sm_86 or another sm_ number")
    return "any", int(name[3:])


def launches(found: list[Case], only: str | None) -> Iterator[tuple[Case, Launch]]:
    """Each distinct launch, and the first case that makes it."""
    seen: set[Launch] = set()
    for case in found:
        for launch in launches_of(case):
            if launch not in seen and only in (None, launch.kernel):
                seen.add(launch)
                yield case, launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=target_of, default="hopper", metavar="hopper|sm_NN")
    parser.add_argument("--features", type=int, nargs="+", default=list(FEATURES))
    parser.add_argument("--every", action="store_true", help="every call and stored type")
    parser.add_argument("--only", help="a kernel's name")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    arguments = parser.parse_args()
    architecture, capability = arguments.target
    chosen = list(launches(cases(architecture, tuple(arguments.features), arguments.every), arguments.only))
    if not arguments.json:
        print(f"{'module':<12}{'kernel':<22}{'first seen in':<38}{'with':<30}", end="")
        print("".join(f"{name:>10}" for name in Binary.__annotations__))
    with ProcessPoolExecutor(2) as pool:
        binaries = pool.map(partial(compiled, capability=capability), [launch for _, launch in chosen])
        for (case, launch), binary in zip(chosen, binaries, strict=True):
            module = launch.module.split(".")[-1]
            if arguments.json:
                labels = {"module": module, "kernel": launch.kernel, "constants": dict(launch.constants)}
                print(json.dumps(labels | asdict(case) | asdict(binary)), flush=True)
                continue
            where = f"{case.covariance_type} {case.precision} {case.n_features} {case.call} {case.stored}"
            flags = " ".join(name.lower() for name, value in launch.constants if value is True)
            print(f"{module:<12}{launch.kernel:<22}{where:<38}{flags:<30}", end="")
            print("".join(f"{value:>10}" for value in asdict(binary).values()), flush=True)


if __name__ == "__main__":
    main()
