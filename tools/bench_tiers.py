"""What a pass takes when none, some or all of the rows stay on a CUDA device, as they are stored and in 16 bits.

    python tools/bench_tiers.py [--rows 16000000] [--precision medium auto] [--output FILE]

float32 rows of 128 features in pinned memory, K = 1024, ``spherical``, realistic; room on the device for ``--share`` of
them as they are stored. A JSON line for each way: milliseconds of every iteration after the first, which fills what
stays; the share of rows found on the device; the digest, which must be the same in one precision. Exits 1 if it is not.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO
from unittest import mock

import torch
from estep_bench.workloads import SHAPES, draw_rows

from streamgmm.fitting import fit
from streamgmm.io.ring import Ring
from streamgmm.io.sources import open_source
from streamgmm.request import FitRequest

K, D = 1024, 128
_DISTINCT_ROWS = 1 << 20


def pinned_rows(n: int) -> torch.Tensor:
    """(n, D) float32 in pinned memory; a million different ones, again and again."""
    shape = replace(SHAPES[0], n=_DISTINCT_ROWS, k=K, d=D)
    distinct = draw_rows("realistic", shape, torch.device("cuda")).rows.cpu()
    rows = torch.empty((n, D), dtype=torch.float32, pin_memory=True)
    for part in rows.split(_DISTINCT_ROWS):
        part.copy_(distinct[: len(part)])
    return rows


@contextmanager
def way(room: int, narrow: bool) -> Iterator[None]:
    """A fit whose device has this much room for rows, which stay there as stored unless they may be ``narrow``."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch("streamgmm.job.Ring", functools.partial(with_room, room)))
        if not narrow:
            patches.enter_context(mock.patch("streamgmm.training.form_to_keep", return_value=None))
        yield


def with_room(room: int, *arguments: object, **named: object) -> Ring:
    return Ring(*arguments, **{**named, "device_memory": room})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000_000)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--precision", nargs="+", default=["medium", "auto"])
    parser.add_argument("--output", type=Path, help="a file for the JSON lines; otherwise stdout")
    arguments = parser.parse_args()
    output: TextIO = arguments.output.open("w") if arguments.output else sys.stdout
    source = open_source(pinned_rows(arguments.rows))
    room = int(arguments.share * arguments.rows * 4 * D)
    ways = {
        "nothing stays": (0, True),
        "as stored": (room, False),
        "in 16 bits": (room, True),
        "all, as stored": (4 * D * arguments.rows * 9 // 8, False),
    }
    differ = False
    for precision in arguments.precision:
        digests = set[str]()
        for name, (bytes_there, narrow) in ways.items():
            with way(bytes_there, narrow):
                request = FitRequest(
                    K, "spherical", max_iter=arguments.iterations, tol=0.0, device="cuda", precision=precision
                )
                result = fit(source, request)
            digests.add(result.mixture.digest)
            later = [record for record in result.history if record["iteration"]][1:]
            facts = {
                "way": name,
                "precision": sorted({str(record["precision"]) for record in later}),
                "ms": [round(1e3 * float(record["update_seconds"]), 1) for record in later],
                "found_on_device": result.hit_rates["device"],
                "digest": result.mixture.digest,
            }
            print(json.dumps(facts), file=output, flush=True)
        differ |= len(digests) > 1
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
