"""The data's way, part by part, each beside its ceiling and its alternatives, turn by turn in one run.

    python tools/bench_stream.py [--rows 4000000] [--features 64] [--folder /tmp] [--rounds 5] [--output FILE]
                                 [--flash-kmeans PATH]

Writes uncompressed Zarr v3 shard sets (with and without a CRC-32C) into FOLDER, removes them afterwards, and measures

* disk → memory, from the page cache: our extents, a plain ``for chunk in zarr`` loop, zarr with ``out=``, zarrs, and
  the ceiling, ``preadv`` of the same bytes by 1 and 8 threads into a few MiB, which caches hold, and into as much as
  the ring's slots on a CUDA device; the first four also by core-second, which other processes disturb less;
* disk → memory past the cache: our O_DIRECT path beside O_DIRECT reads of the same files;
* on a CUDA device: the copy of pinned memory, `Ring.stream` from pinned memory, page cache and disk to the device, a
  plain ``for chunk in zarr`` loop to it, and later passes over data half again as large as the device's budget;
* with the E-step of a spherical mixture on rows as overlapping as real ones: the kernel alone, the link alone, both
  together, beside flash-kmeans' streaming where that is installed.

One row in 64 that a reader brings is compared with what was written. Prints JSON lines, and a table of medians and
ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TextIO

import numpy as np
import torch
import zarr
from estep_bench.peers import peer_module
from estep_bench.workloads import SHAPES, draw_rows, workload
from zarr.codecs import Crc32cCodec
from zarr.core.buffer.cpu import NDBuffer, buffer_prototype

from streamgmm.estep import bind, e_step
from streamgmm.io.ceilings import cache_rate, pinned_rate, sample_extents, storage_rate
from streamgmm.io.intake import SLOTS
from streamgmm.io.plan import Extent, plan_chunks, round_chunk_rows
from streamgmm.io.readers import reader_threads
from streamgmm.io.ring import Ring
from streamgmm.io.sources import open_source
from streamgmm.statistics import SEGMENTS

CHUNK_BYTES = 64 << 20
"""What a consumer takes at once, whoever reads."""

GPU_CHUNK_BYTES = 256 << 20

STAGES = ("cache", "disk", "device", "kernel")

_STEADY_BYTES = 8 << 30
"""Read at once from the page cache by our path, as by the ceiling beside it: the first chunks of all take longer."""

_STREAMED_PASSES = 3
"""With a kernel, one after the other: nothing hides the copy of the first chunk of all, here or in a peer."""

_CHECKED_ROW = 64

_DISTINCT_ROWS = 1 << 20


@dataclass(frozen=True)
class Layout:
    """A shard set on disk and how long a pass over it is."""

    name: str
    path: Path
    rows: int
    row_bytes: int

    @property
    def chunk_rows(self) -> int:
        return round_chunk_rows(CHUNK_BYTES // self.row_bytes, 1)

    @property
    def size(self) -> int:
        return self.rows * self.row_bytes


def write(folder: Path, name: str, rows: int, features: int, chunk_rows: int, *, checked: bool) -> Layout:
    """An array whose row i begins with i, modulo what its type holds; the rest is noise."""
    path = folder / f"{name}.zarr"
    shard = chunk_rows * 16
    array = zarr.create_array(
        path,
        shape=(rows, features),
        dtype="float32",
        chunks=(chunk_rows, features),
        shards=(shard, features),
        compressors=[Crc32cCodec()] if checked else None,
        config={"write_empty_chunks": True},
    )
    rng = np.random.default_rng(0)
    noise = rng.random((min(shard, rows), features), dtype=np.float32)
    for start in range(0, rows, shard):
        part = noise[: min(shard, rows - start)]
        part[:, 0] = np.arange(start, start + len(part))
        array[start : start + len(part)] = part
    return Layout(name, path, rows, 4 * features)


def check(layout: Layout, start: int, rows: np.ndarray) -> None:
    """The first column counts the rows: a hole, a repeat or a stale buffer shows. All of them would time this."""
    expected = np.arange(start, start + len(rows), _CHECKED_ROW, dtype=np.float32)
    assert np.array_equal(rows[::_CHECKED_ROW, 0], expected), f"{layout.path}: rows from {start} are wrong"


def ours(layout: Layout, threads: int, host_memory: int | None = None, passes: int = 1) -> Callable[[], None]:
    """Passes through the ring, on the CPU; source and ring are made once, as a run makes them."""
    source = open_source(layout.path)
    assert source.read_path == "extents"
    ring = Ring(source, layout.chunk_rows, torch.device("cpu"), threads, host_memory=host_memory)
    spans = plan_chunks(layout.rows, layout.chunk_rows)

    def read() -> None:
        for chunk in ring.stream(spans * passes):
            check(layout, chunk.span.start, chunk.rows.numpy())

    return read


@contextmanager
def pipeline(name: str) -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"), zarr.config.set({"codec_pipeline.path": name}):
        yield


def zarr_loop(layout: Layout) -> Callable[[], None]:
    """What one writes first: slices of an array."""
    array = zarr.open_array(layout.path, mode="r")

    def read() -> None:
        for start in range(0, layout.rows, layout.chunk_rows):
            check(layout, start, array[start : start + layout.chunk_rows])

    return read


def zarr_out(layout: Layout, name: str) -> Callable[[], None]:
    """Slices into a buffer that is used again."""
    with pipeline(name):
        array = zarr.open_array(layout.path, mode="r")
    out = np.empty((layout.chunk_rows, layout.row_bytes // 4), np.float32)

    def read() -> None:
        for start in range(0, layout.rows, layout.chunk_rows):
            part = out[: min(layout.chunk_rows, layout.rows - start)]
            rows = (slice(start, start + len(part)), slice(None))
            array.get_basic_selection(rows, out=NDBuffer.from_numpy_array(part), prototype=buffer_prototype)
            check(layout, start, part)

    return read


def rate(work: Callable[[], None], size: int) -> float:
    begun = time.perf_counter()
    work()
    return size / (time.perf_counter() - begun)


def core_rate(work: Callable[[], None], size: int) -> float:
    """Bytes for each second that a core was at work, all threads together: what other processes do changes little."""
    begun = time.process_time()
    work()
    return size / (time.process_time() - begun)


def cached_readers(
    layout: Layout, threads: int, timed: Callable[[Callable[[], None], int], float] = rate
) -> dict[str, Callable[[], float]]:
    """Every way to bring the rows from the page cache to memory, as functions that give bytes a second."""
    batched = "zarr.core.codec_pipeline.BatchedCodecPipeline"
    passes = max(1, _STEADY_BYTES // layout.size)
    extents_read = ours(layout, threads, passes=passes)
    readers: dict[str, Callable[[], None]] = {
        "zarr loop": zarr_loop(layout),
        "zarr out=": zarr_out(layout, batched),
    }
    if importlib.util.find_spec("zarrs") is not None:
        readers["zarrs"] = zarr_out(layout, "zarrs.ZarrsCodecPipeline")
    measured: dict[str, Callable[[], float]] = {"extents": lambda: timed(extents_read, passes * layout.size)}
    measured |= {name: lambda work=work: timed(work, layout.size) for name, work in readers.items()}
    if timed is not rate:
        return measured
    extents = sample_extents(open_source(layout.path))
    for count in (1, 8):
        measured[f"preadv, {count} threads"] = lambda count=count: cache_rate(extents, count, 1.0, layout.size)
    measured["preadv, 8 threads, into as much as three chunks"] = lambda: into_chunks(extents, layout)
    return measured


def into_chunks(extents: Sequence[Extent], layout: Layout) -> float:
    """Bytes a second that 8 threads read into as much memory as the ring's slots take on a CUDA device."""
    return cache_rate(extents, 8, 1.0, layout.size, into=SLOTS * GPU_CHUNK_BYTES // 8)


def direct_readers(layout: Layout, threads: int) -> dict[str, Callable[[], float]]:
    """Ways past the page cache; the ceiling is given as many threads as we take, and 8."""
    extents, read = sample_extents(open_source(layout.path)), ours(layout, threads, host_memory=0)
    return {
        "extents, O_DIRECT": lambda: rate(read, layout.size),
        f"O_DIRECT, {threads} threads": lambda: storage_rate(extents, threads, 3.0) or 0.0,
        "O_DIRECT, 8 threads": lambda: storage_rate(extents, 8, 3.0) or 0.0,
    }


def device_readers(layout: Layout, threads: int, gigabytes: float) -> dict[str, Callable[[], float]]:
    """Ways to a CUDA device: the link's ceiling, and the ring from pinned memory, page cache and disk."""
    device = torch.device("cuda")
    features = 128
    rows = int(gigabytes * 1e9) // (2 * features)
    pinned = torch.zeros((rows, features), dtype=torch.float16).pin_memory()

    def through(
        data: object,
        passes: int = 1,
        *,
        first: bool = False,
        host_memory: int | None = None,
        device_memory: int = 0,
        chunk_bytes: int = GPU_CHUNK_BYTES,
    ) -> float:
        """Bytes a second of ``passes`` after the first one, which fills what is kept; or of that ``first`` one."""
        source = open_source(data)
        row_bytes = source.shape[1] * source.dtype.itemsize
        chunk = round_chunk_rows(chunk_bytes // row_bytes, 1)

        def timed(passes: int) -> float:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in ring.stream(plan_chunks(source.shape[0], chunk, most=SEGMENTS) * passes):
                pass
            torch.cuda.synchronize()
            return passes * source.shape[0] * row_bytes / (time.perf_counter() - begun)

        with Ring(source, chunk, device, threads, host_memory=host_memory, device_memory=device_memory) as ring:
            once = timed(1)
            return once if first else timed(passes)

    def loop() -> float:
        """What one writes first."""
        array = zarr.open_array(layout.path, mode="r")
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for start in range(0, layout.rows, layout.chunk_rows):
            torch.from_numpy(array[start : start + layout.chunk_rows]).to(device)
        torch.cuda.synchronize()
        return layout.size / (time.perf_counter() - begun)

    two_thirds, extents = layout.size * 2 // 3, sample_extents(open_source(layout.path))
    steady = max(1, _STEADY_BYTES // layout.size)
    return {
        "pinned copy": lambda: pinned_rate(device, 1.0),
        "ring from pinned memory": lambda: through(pinned, 4),
        "ring from page cache": lambda: through(layout.path, steady),
        "ring from page cache, chunks of 1 GiB": lambda: through(layout.path, steady, chunk_bytes=1 << 30),
        "preadv, 8 threads": lambda: cache_rate(extents, 8, 1.0, layout.size),
        "preadv, 8 threads, into as much as three chunks": lambda: into_chunks(extents, layout),
        "zarr loop": loop,
        "ring from disk, O_DIRECT": lambda: through(layout.path, host_memory=0),
        "O_DIRECT, 8 threads": lambda: storage_rate(extents, 8, 3.0) or 0.0,
        "ring, kept in pinned memory": lambda: through(layout.path, host_memory=layout.size * 3),
        "1.5 x device, first pass": lambda: through(layout.path, first=True, host_memory=0, device_memory=two_thirds),
        "1.5 x device, later passes": lambda: through(layout.path, 2, host_memory=0, device_memory=two_thirds),
    }


def kernel_readers(
    threads: int, gigabytes: float, components: int, flash_kmeans: Path | None
) -> dict[str, Callable[[], float]]:
    """E-step over pinned rows: the kernel alone on resident rows, and end to end; beside flash-kmeans' iteration."""
    device = torch.device("cuda")
    recipe = replace(SHAPES[0], n=_DISTINCT_ROWS, k=components)
    case = workload("realistic", draw_rows("realistic", recipe, device), components, "spherical")
    distinct = case.rows.half().cpu()
    rows = max(1, int(gigabytes * 1e9) // distinct.nbytes) * _DISTINCT_ROWS
    pinned = torch.empty((rows, distinct.shape[1]), dtype=torch.float16, pin_memory=True)
    for part in pinned.split(_DISTINCT_ROWS):
        part.copy_(distinct)
    chunk = round_chunk_rows(GPU_CHUNK_BYTES // (distinct.nbytes // _DISTINCT_ROWS), 1 << 16)
    resident = pinned[: min(rows, 8 * chunk)].to(device)
    bound = bind(case.mixture, case.frame, "medium", device, 1)

    def timed(parts: Iterator[torch.Tensor]) -> float:
        sums, size = bound.empty_statistics(), 0
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for part in parts:
            e_step(part, bound, sums)
            size += part.nbytes
        torch.cuda.synchronize()
        return size / (time.perf_counter() - begun)

    def kernel() -> float:
        timed(iter(resident.split(chunk)))
        return timed(iter(resident.split(chunk)))

    def end_to_end() -> float:
        with Ring(open_source(pinned), chunk, device, threads) as ring:
            spans = plan_chunks(rows, chunk, most=SEGMENTS) * _STREAMED_PASSES
            return timed(part.rows for part in ring.stream(spans))

    found = {
        f"ring and kernel, K={components}": end_to_end,
        f"kernel alone, K={components}": kernel,
        "pinned copy": lambda: pinned_rate(device, 1.0),
    }
    if (peer := peer_module("flash_kmeans", flash_kmeans)) is not None:
        found[f"flash-kmeans, K={components}"] = flash_streaming(peer, pinned, case.mixture.means, chunk)
    return found


def flash_streaming(peer: ModuleType, pinned: torch.Tensor, means: np.ndarray, chunk: int) -> Callable[[], float]:
    """Its assignment of chunks that two streams copy from pinned memory, as its own streaming does."""
    assign = importlib.import_module(f"{peer.__name__}.assign_euclid_triton").euclid_assign_triton
    centroids = torch.tensor(means, device="cuda").half()[None]
    streams = [torch.cuda.Stream() for _ in range(2)]
    buffers = [torch.empty((chunk, pinned.shape[1]), dtype=torch.float16, device="cuda") for _ in range(2)]

    def read() -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for index, part in enumerate(pinned.split(chunk) * _STREAMED_PASSES):
            with torch.cuda.stream(streams[index % 2]):
                x = buffers[index % 2][: len(part)]
                x.copy_(part, non_blocking=True)
                assign(x[None], centroids, x.float().square().sum(1)[None], use_heuristic=True)
        torch.cuda.synchronize()
        return _STREAMED_PASSES * pinned.nbytes / (time.perf_counter() - begun)

    return read


Stages = Iterator[tuple[str, dict[str, Callable[[], float]]]]


def stages_on_host(layout: Layout, arguments: argparse.Namespace) -> Stages:
    """Those of ``arguments.stages`` that need no device: a name and its readers."""
    threads = arguments.threads
    if "cache" in arguments.stages:
        yield "page cache to memory", cached_readers(layout, threads)
        yield "page cache to memory, a core-second", cached_readers(layout, threads, core_rate)
    if "disk" in arguments.stages:
        yield "disk to memory", direct_readers(layout, threads)


def stages_on_device(layout: Layout, arguments: argparse.Namespace) -> Stages:
    """Those that do."""
    threads, amount = arguments.threads, arguments.pinned_gigabytes
    if "device" in arguments.stages:
        yield "to the device", device_readers(layout, threads, amount)
    if "kernel" in arguments.stages:
        for k in (1024, 8192):
            yield "with a kernel", kernel_readers(threads, amount, k, arguments.flash_kmeans)


def measure(
    stage: str, layout: str, readers: dict[str, Callable[[], float]], rounds: int, output: TextIO
) -> dict[str, list[float]]:
    """Every reader in turn, ``rounds`` times after a warm-up; a JSON line each."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, reader in readers.items():
            bytes_per_second = reader()
            if turn:
                rates[name].append(bytes_per_second / 1e9)
    for name, values in rates.items():
        line = {"stage": stage, "data": layout, "reader": name, "GB_per_s": statistics.median(values), "rounds": values}
        print(json.dumps(line), file=output, flush=True)
    return rates


def table(stage: str, layout: str, rates: dict[str, list[float]]) -> None:
    """Medians, and the ratio of ours to each other one: the median over rounds, with least and greatest."""
    first = next(iter(rates))
    print(f"\n{stage}, {layout}: GB/s, median of {len(rates[first])}; {first} over each, median (least, greatest)")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates[first], values, strict=True) if b]
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}, {max(ratios):.2f})" if ratios else "-"
        print(f"  {name:<34}{statistics.median(values):8.2f}  {'' if name == first else spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--chunk-rows", type=int, default=8192, help="rows of an inner chunk; 16 make a shard")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--threads", type=int, default=reader_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pinned-gigabytes", type=float, default=8.6, help="with a CUDA device")
    parser.add_argument("--flash-kmeans", type=Path, help="its folder; otherwise the installed package")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--output", type=Path, help="a file for the JSON lines; otherwise stdout")
    arguments = parser.parse_args()
    output = arguments.output.open("w") if arguments.output else sys.stdout
    folder = Path(tempfile.mkdtemp(prefix="bench_stream.", dir=arguments.folder))
    tables = []
    try:
        layouts = [
            write(folder, name, arguments.rows, arguments.features, arguments.chunk_rows, checked=checked)
            for name, checked in (("raw", False), ("crc32c", True))
        ]
        os.sync()
        for layout in layouts:
            for stage, readers in stages_on_host(layout, arguments):
                tables.append((stage, layout.name, measure(stage, layout.name, readers, arguments.rounds, output)))
        if torch.cuda.is_available():
            for stage, readers in stages_on_device(layouts[0], arguments):
                tables.append((stage, "fp16", measure(stage, "fp16", readers, arguments.rounds, output)))
    finally:
        shutil.rmtree(folder)
    for stage, name, rates in tables:
        table(stage, name, rates)


if __name__ == "__main__":
    main()
