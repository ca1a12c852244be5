"""The E-step beside its peers on one GPU: the same rows, the same run, correctness first.

    python tools/bench_estep.py [--flash-gmm PATH] [--flash-kmeans PATH] [--only REGEX] [--output FILE] [--quick]
    python tools/bench_estep.py --accuracy [--only REGEX] [--output FILE]
    python tools/bench_estep.py --device cpu --rows 2000        # a smoke run of everything that needs no GPU

A time is the median of repeats between CUDA events: one pass over rows that lie on the device, statistics included.
``queue`` is a pass among several that are waited for together, as the passes of a fit follow one another.
Every kernel is first held against fp64 on some of its rows. One of ours that is wrong is not timed; a peer is, and its
error stands beside its time. Rows are

realistic
    a rotated Gaussian with a power-law spectrum and a log-normal contrast, as overlapping as image patches and SIFT;
    for ``tied``, whose covariance would explain such rows alone, clusters that share it, and overlap as much;
noise
    N(0, I), where no responsibility is negligible;
separated
    clusters of unit noise whose means are 2·N(0, 1), with their own parameters.

The first two meet parameters fitted by three EM iterations, from random rows or from the clusters. ``live`` is the
share of pairs that the second launch visits: of rows and component tiles, or of rows and components for ``full``.
``comp`` and ``tiles`` say what a perfect one would keep: components and 64-component tiles with more than 2⁻²⁴/K of a
row. ``floor`` is the largest of three times at rates measured in the same run: matrix products, exponentials, reading
the rows. JSON lines hold more: stages, errors, what went wrong.

``--accuracy`` measures errors instead of times: N = 200,000, K = 256, D = 64, five data sets, scaled four ways.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from estep_bench.accuracy import accuracy
from estep_bench.peers import peer_module
from estep_bench.session import Session
from estep_bench.tables import accuracy_table, bench_table
from estep_bench.timing import bench

EXAMPLES = """\
--only finds a regular expression in the words of a case, 'N K D type data stored precision implementation':
    "1024 128 spherical"                    one shape and type: ours and its peers
    " 768 .*streamgmm"                      ours on wide rows
    "realistic .*(medium|float16)"          realistic rows: ours at medium, k-means in float16
    "(tied|full) .*float32 medium"          two types from float32 rows
    " high "                                the wider precision
    "flash-(gmm|kmeans)"                    the peers alone
and with --accuracy in 'type data scaling':
    "diag noise 0.05"                       one data set, scaled every way
    "spread over 1e4"                       one scaling
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accuracy", action="store_true", help="measure errors, not times")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=10**9, help="at most so many rows a shape, and fewer components")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="one stored type: float32 for ours, float16 for k-means")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases that this finds; examples below")
    parser.add_argument("--output", type=Path, help="a file for the JSON lines; otherwise stdout")
    parser.add_argument("--flash-kmeans", type=Path, help="its folder; otherwise the installed package")
    parser.add_argument("--flash-gmm", type=Path, help="a checkout of Flash-GMM")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    peers = device.type == "cuda" and not arguments.accuracy
    session = Session(
        device=device,
        rows=arguments.rows,
        repeats=arguments.repeats,
        quick=arguments.quick,
        only=re.compile(arguments.only),
        output=arguments.output.open("w") if arguments.output else sys.stdout,
        flash_kmeans=peer_module("flash_kmeans", arguments.flash_kmeans) if peers else None,
        flash_gmm=peer_module("flash_gmm", arguments.flash_gmm) if peers and arguments.flash_gmm else None,
    )
    print(accuracy_table(accuracy(session)) if arguments.accuracy else bench_table(bench(session)))


if __name__ == "__main__":
    main()
