"""Posting lists at the speed of the data's way: the link, the disk, the device, and ``streamgmm assign`` as a whole.

    python tools/bench_assign.py [--rows 100000000] [--features 128] [--lists 4096] [--dtype uint8] [--policy air]
                                 [--device cuda] [--folder /tmp] [--limit SIZE] [--output FILE]

Writes clustered rows to FOLDER (removed afterwards) and measures, in one run: the copy from pinned memory to the
device; the file, past the page cache and from it; rows streamed from pinned memory to lists on the host; the device
alone, on rows that lie there; and ``streamgmm assign`` over the file in a process of its own, with what its memory
grew by over the same command on a thousand rows. Every row must then be in one or two lists, and 20,000 rows in the
list nearest in fp64. On a CPU the parts that need a GPU are left out. Prints a JSON line and a few short ones; exits 1
if a list is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clustered import PIECE, SUFFIXES, piece, write

from streamgmm.ann.listing import lister, stream_lists
from streamgmm.ann.nearest import Centroids, finder, nearest
from streamgmm.ann.policies import Policy
from streamgmm.ann.postings import PostingLists
from streamgmm.ann.quantizer import quantizer_of
from streamgmm.inference import InferenceSettings
from streamgmm.io.ceilings import cache_rate, pinned_rate, sample_extents, storage_rate
from streamgmm.io.readers import reader_threads
from streamgmm.io.sources import open_source

_ROUNDS = 2
_ROWS_A_LIST = 32
_PINNED_BYTES, _RESIDENT_ROWS = 8_000_000_000, 1 << 22
_CHECKED, _TIE = 20_000, 1e-5
_FEW = 1000
_SECONDS = 3.0


def centroids_of(arguments: argparse.Namespace, device: torch.device) -> np.ndarray:
    """K centroids after a few rounds of k-means on some rows, (K, D) float32."""
    k = arguments.lists
    rows = piece(1, max(k, min(_ROWS_A_LIST * k, PIECE)), PIECE, arguments.features, torch.float32, device)
    if arguments.dtype == "uint8":
        rows = (rows + 128).clamp(0, 255)
    centroids = rows[:k].clone()
    for _ in range(_ROUNDS):
        own = Centroids.of(centroids.cpu().numpy(), device)
        first = torch.cat([nearest(part, own, 1).lists[:, 0] for part in rows.split(4096)])
        sums = torch.zeros_like(centroids).index_add_(0, first, rows)
        counts = torch.bincount(first, minlength=k)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids.cpu().numpy()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(arguments: argparse.Namespace, centroids: np.ndarray, m: int, device: torch.device) -> dict[str, float]:
    """Seconds a million rows that lie on the device: to their nearest centroids, and on to their lists."""
    dtype, policy = getattr(torch, arguments.dtype), Policy(arguments.policy)
    n = min(arguments.rows, _RESIDENT_ROWS if device.type == "cuda" else PIECE // 8)
    rows = torch.cat([piece(i, min(PIECE, n - i), n, arguments.features, dtype, device) for i in range(0, n, PIECE)])
    own = Centroids.of(centroids, device)
    stored = np.dtype(arguments.dtype)
    found = {"nearest": partial(finder(own, stored), m=m), "lists": lister(own, stored, m, policy)}
    seconds = {}
    for name in ("nearest", "lists"):
        for _ in range(2):
            synchronize(device)
            begun = time.perf_counter()
            for part in rows.split(1 << 18 if device.type == "cuda" else 4096):
                found[name](part)
            synchronize(device)
            seconds[name] = (time.perf_counter() - begun) * 1e6 / n
    return seconds


def pinned_stream(arguments: argparse.Namespace, centroids: np.ndarray, m: int, device: torch.device) -> float:
    """Bytes a second from pinned memory to lists on the host."""
    dtype, d = getattr(torch, arguments.dtype), arguments.features
    n = max(1, min(arguments.rows, _PINNED_BYTES // (d * dtype.itemsize)))
    rows = torch.empty((n, d), dtype=dtype, pin_memory=True)
    for start in range(0, n, PIECE):
        part = rows[start : start + PIECE]
        part.copy_(piece(start, len(part), n, d, dtype, device))
    quantizer, settings = quantizer_of(centroids), InferenceSettings(device)

    def seconds(rows: torch.Tensor) -> float:
        begun, done = time.perf_counter(), 0
        for _, lists in stream_lists(open_source(rows), quantizer, m, Policy(arguments.policy), settings):
            done += len(lists)
        assert done == len(rows)
        return time.perf_counter() - begun

    seconds(rows[: min(n, PIECE)])
    return rows.nbytes / seconds(rows)


@dataclass
class Watched:
    """A command's JSON, and what was seen of it: seconds of its phases, and peaks in bytes."""

    facts: dict[str, Any]
    seconds: float
    streaming: float
    inverting: float
    anonymous: int
    device_bytes: int


def watched(command: list[str], out: Path, device: torch.device) -> Watched:
    """Run ``streamgmm assign`` that writes to ``out``, and look at it every few milliseconds."""
    scratch = out.with_name(f".{out.name}.partial")
    before = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    anonymous, least, streamed, published, begun_streaming = 0, before, 0.0, 0.0, 0.0
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.extend(child.communicate()))
    reader.start()
    while reader.is_alive():
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            status = ""
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            anonymous = max(anonymous, int(found[1]) * 1024)
        if device.type == "cuda":
            least = min(least, torch.cuda.mem_get_info(device)[0])
        now = time.perf_counter() - begun
        if not begun_streaming and scratch.exists():
            begun_streaming = now
        if begun_streaming and not streamed and (scratch / "result").exists():
            streamed = now
        if streamed and not published and out.exists():
            published = now
        reader.join(0.005)
    seconds = time.perf_counter() - begun
    if child.returncode:
        sys.exit(f"{' '.join(command)}: status {child.returncode}: {texts[1]}")
    facts = json.loads(texts[0].splitlines()[-1])
    streaming, inverting = max(0.0, streamed - begun_streaming), max(0.0, (published or seconds) - streamed)
    return Watched(facts, seconds, streaming, inverting, anonymous, before - least)


def check(data: Path, lists: Path, n_rows: int) -> dict[str, object]:
    """Rows that are in no list or in more than two, and of some rows those that are not in their nearest one."""
    postings = PostingLists.load(lists)
    chosen = np.sort(np.random.default_rng(0).choice(n_rows, min(_CHECKED, n_rows), replace=False))
    wanted = np.zeros(n_rows, bool)
    wanted[chosen] = True
    times = np.zeros(n_rows, np.uint8)
    places, ids = [], postings.ids
    for start in range(0, len(ids), 1 << 22):
        part = np.asarray(ids[start : start + (1 << 22)])
        np.add.at(times, part, 1)
        places.append(start + np.flatnonzero(wanted[part]))
    place = np.concatenate(places)
    own = np.searchsorted(postings.offsets, place, side="right") - 1
    row = np.searchsorted(chosen, ids[place])
    x = open_source(data).gather(chosen)[0].astype(np.float64)
    centroids = postings.centroids.astype(np.float64)
    best, norms = np.full(len(chosen), np.inf), (centroids**2).sum(1)
    for start in range(0, len(chosen), 1024):
        part = x[start : start + 1024]
        best[start : start + 1024] = ((part**2).sum(1)[:, None] - 2 * part @ centroids.T + norms).min(1)
    nearest_own = np.full(len(chosen), np.inf)
    np.minimum.at(nearest_own, row, ((x[row] - centroids[own]) ** 2).sum(1))
    worse = nearest_own > best * (1 + _TIE) + 1e-9 * norms.max()
    return {
        "rows_in_no_list": int((times == 0).sum()),
        "rows_in_more_than_two": int((times > 2).sum()),
        "rows_checked": len(chosen),
        "rows_not_in_their_nearest": int(worse.sum()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--lists", type=int, default=4096)
    parser.add_argument("--dtype", choices=[str(t).removeprefix("torch.") for t in SUFFIXES], default="uint8")
    parser.add_argument("--policy", choices=["top1", "top2", "soar", "air"], default="air")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--limit", help="--memory of the command")
    parser.add_argument("--output", type=Path, help="a file for the JSON line")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    m = {"top1": 1, "top2": 2}.get(arguments.policy, 16)
    size = arguments.rows * arguments.features * dtype.itemsize
    folder = Path(tempfile.mkdtemp(prefix="assign.", dir=arguments.folder))
    data, few, lists = folder / f"rows{SUFFIXES[dtype]}", folder / f"few{SUFFIXES[dtype]}", folder / "centroids.npy"
    facts: dict[str, Any] = {
        name: value if isinstance(value, int) else str(value) for name, value in vars(arguments).items()
    } | {"data_bytes": size}

    def assign(source: Path, out: Path) -> Watched:
        limit = [] if arguments.limit is None else ["--memory", arguments.limit]
        command = [sys.executable, "-m", "streamgmm", "assign", str(lists), str(source), str(out), "--json"]
        return watched([*command, "--policy", arguments.policy, "--device", arguments.device, *limit], out, device)

    try:
        begun = time.perf_counter()
        for path, n in ((data, arguments.rows), (few, min(_FEW, arguments.rows))):
            write(path, n, arguments.features, dtype, device)
        centroids = centroids_of(arguments, device)
        np.save(lists, centroids)
        facts["seconds_preparing"] = time.perf_counter() - begun
        extents = sample_extents(open_source(data))
        facts["disk_gb_per_s"] = (storage_rate(extents, reader_threads(), _SECONDS) or 0.0) / 1e9
        facts["page_cache_gb_per_s"] = cache_rate(extents, reader_threads(), 1.0) / 1e9
        facts["seconds_a_million_rows"] = resident(arguments, centroids, m, device)
        if device.type == "cuda":
            facts["link_gb_per_s"] = pinned_rate(device, 1.0) / 1e9
            facts["pinned_gb_per_s"] = pinned_stream(arguments, centroids, m, device) / 1e9
            facts["share_of_link"] = facts["pinned_gb_per_s"] / facts["link_gb_per_s"]
            torch.cuda.empty_cache()
        small = assign(few, folder / "few")
        whole = assign(data, folder / "out")
        facts |= {
            "seconds": whole.facts["seconds"],
            "seconds_with_start": whole.seconds,
            "seconds_streaming": whole.streaming,
            "seconds_inverting": whole.inverting,
            "rows_per_s": arguments.rows / whole.facts["seconds"],
            "gb_per_s": size / whole.facts["seconds"] / 1e9,
            "copies": whole.facts["copies"],
            "peak_anonymous_bytes": whole.anonymous,
            "growth_bytes": whole.anonymous - small.anonymous,
            "peak_device_bytes": whole.device_bytes,
            "check": check(data, folder / "out", arguments.rows),
        }
    finally:
        shutil.rmtree(folder)
    text = json.dumps(facts)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    for name, value in facts.items():
        if isinstance(value, float):
            print(f"{name:<24}{value:14,.3f}", file=sys.stderr)
    wrong = {name: count for name, count in facts["check"].items() if name != "rows_checked" and count}
    print(f"wrong: {wrong}" if wrong else "every list is right", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
