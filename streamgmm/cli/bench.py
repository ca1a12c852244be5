"""``streamgmm bench``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch

from streamgmm.cli.options import as_json, one_path, print_result, threads_option
from streamgmm.cost import Data, Rates, pass_seconds, slowest, stage_seconds
from streamgmm.device import compute_workers, resolve_device
from streamgmm.estep import bind, e_step
from streamgmm.inference import frame_of_mixture
from streamgmm.io.bfloat16 import as_tensor, values
from streamgmm.io.ceilings import cache_rate, copy_rate, pinned_rate, sample_extents, source_rate, storage_rate
from streamgmm.io.sources import Source, open_source
from streamgmm.kernels import Problem, available_precisions
from streamgmm.mixture import Mixture, covariance_shape
from streamgmm.parallel import one_thread
from streamgmm.units import format_bytes

Facts = dict[str, object]

SECONDS = 1.0
"""Each measurement's share of the time."""

SYNTHETIC = (1_000_000, 64)
"""Shape of the rows that stand in where no data is named."""

_KERNEL_ROWS = 1 << 18


@click.command(epilog="Example: streamgmm bench vectors.zarr -k 1024 --covariance diag")
@click.argument("data", nargs=-1, type=click.Path())
@click.option("-k", "--components", type=click.IntRange(1), default=64, show_default=True, help="Components.")
@click.option(
    "--covariance",
    type=click.Choice(["full", "tied", "diag", "spherical"]),
    default="diag",
    show_default=True,
    help="Covariance type.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@threads_option
@as_json
def bench(data: tuple[str, ...], components: int, covariance: str, device: str, threads: int, as_json: bool) -> None:
    """Measure what limits a pass over DATA here: disk, decoding, link and kernel, each alone, and predict its time.

    Takes some ten seconds. Without DATA, a file of random float32 vectors in the temporary folder stands in for it.
    """
    target = resolve_device(device)
    with _data(data) as source:
        rates = _measured(source, components, covariance, target, threads)
        facts = {**_described(source, components, covariance, target), **rates, **predict_pass(source, rates)}
    print_result(facts, _lines(facts), as_json=as_json)


@contextmanager
def _data(data: tuple[str, ...]) -> Iterator[Source]:
    if data:
        source = open_source(one_path(data))
        yield source
        source.close()
        return
    with tempfile.TemporaryDirectory(prefix="streamgmm-bench.") as folder:
        path = Path(folder, "random.npy")
        np.save(path, np.random.default_rng(0).random(SYNTHETIC, dtype=np.float32))
        # Dirty pages cannot be dropped from the cache, and reading past it would wait for them.
        with path.open("rb") as written:
            os.fsync(written.fileno())
        source = open_source(path)
        yield source
        source.close()


def _described(source: Source, components: int, covariance: str, device: torch.device) -> Facts:
    return {
        "data": source.name,
        "n_samples": source.shape[0],
        "n_features": source.shape[1],
        "read_path": source.read_path,
        "stored_bytes": source.stored_bytes,
        "row_bytes": source.shape[1] * source.dtype.itemsize,
        "n_components": components,
        "covariance_type": covariance,
        "device": str(device),
    }


def _measured(source: Source, components: int, covariance: str, device: torch.device, threads: int) -> Facts:
    """Every ceiling by name, in bytes a second (``kernel_rows``: rows a second); None where there is no such thing."""
    extents = sample_extents(source)
    rates: Facts = {"disk": None, "cache_1_thread": None, "cache_8_threads": None, "link": None}
    if extents:
        # Past the cache first: it leaves nothing there that would help what follows.
        rates["disk"] = storage_rate(extents, 8, SECONDS)
        rates["cache_1_thread"] = cache_rate(extents, 1, SECONDS)
        rates["cache_8_threads"] = cache_rate(extents, 8, SECONDS)
    rates["memory_copy"] = copy_rate(SECONDS)
    rates["source"] = source_rate(source, threads, SECONDS)
    if device.type == "cuda":
        rates["link"] = pinned_rate(device, SECONDS)
    rates["kernel_rows"] = _kernel_rate(source, components, covariance, device)
    return rates


@one_thread()
def _kernel_rate(source: Source, components: int, covariance: str, device: torch.device) -> float:
    """Rows a second of the E-step alone, over rows that lie on the device, about means drawn from them."""
    n, d = source.shape
    rows = as_tensor(source.read(0, min(n, _kernel_rows(components, d)))).to(device)
    picked = np.linspace(0, len(rows) - 1, components).astype(np.int64)
    means = values(source.gather(np.unique(picked))[0]).astype(np.float64)
    means = means[np.arange(components) % len(means)]
    spread = np.maximum(means.std(0), 1e-6) ** 2
    shape = covariance_shape(covariance, components, d)
    if covariance == "spherical":
        covariances = np.full(shape, spread.mean())
    elif covariance == "diag":
        covariances = np.broadcast_to(spread, shape).copy()
    else:
        covariances = np.broadcast_to(np.diag(spread), shape).copy()
    mixture = Mixture(np.full(components, 1 / components), means, covariances, covariance)
    frame, workers = frame_of_mixture(mixture, source.dtype), compute_workers(device)
    problem = Problem(components, d, covariance)
    bound = bind(mixture, frame, available_precisions(problem, device)[0], device, workers)
    granule = bound.kernel.granule(problem)
    rows = rows[: max(min(granule, len(rows)), len(rows) // granule * granule)]
    sums = bound.empty_statistics()
    e_step(rows[:granule], bound, sums)
    _finish(device)
    begun, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - begun < SECONDS:
        e_step(rows, bound, sums)
        _finish(device)
        times += 1
    return times * len(rows) / (time.perf_counter() - begun)


def _kernel_rows(components: int, n_features: int) -> int:
    """Enough rows to keep a device busy, and few enough for a CPU to finish soon."""
    return max(1024, min(_KERNEL_ROWS, (1 << 33) // max(1, components * n_features)))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def predict_pass(source: Source, rates: Facts) -> Facts:
    """Seconds of a pass by what limits it, once from the disk and once from the page cache, and the bottlenecks.

    Stages work at the same time, so a pass takes as long as its slowest one. Decoding takes place on the way from disk
    or page cache, beside it.
    """
    n, d = source.shape
    names = {"disk": "disk", "source": "source", "link": "link", "rows": "kernel_rows"}
    found = {name: rates[measured] for name, measured in names.items()}
    known = Rates(**{name: rate for name, rate in found.items() if isinstance(rate, float)})
    alone = stage_seconds(Data(n, d, source.dtype.itemsize, source.stored_bytes), known)
    way = "decode" if source.read_path == "decode" else "page cache"
    stages = {way if name == "source" else name: value for name, value in alone.items() if name != "reduction"}
    cached = {name: value for name, value in stages.items() if name != "disk"}
    return {
        "stage_seconds": stages,
        "pass_seconds": pass_seconds(stages, known),
        "bottleneck": slowest(stages),
        "cached_pass_seconds": pass_seconds(cached, known),
        "cached_bottleneck": slowest(cached),
    }


def _lines(facts: Facts) -> list[str]:
    names = {
        "disk": "disk, O_DIRECT, 8 threads",
        "cache_1_thread": "page cache, preadv, 1 thread",
        "cache_8_threads": "page cache, preadv, 8 threads",
        "memory_copy": "memory copy, 1 thread",
        "source": f"these rows to memory ({facts['read_path']})",
        "link": "pinned memory to device",
    }
    lines = [f"{facts['data']}: {facts['n_samples']:,} rows of {facts['n_features']} features, "
             f"{format_bytes(_number(facts['stored_bytes']))} in files"]  # fmt: skip
    for key, name in names.items():
        rate = facts[key]
        lines.append(f"  {name:<38}{f'{rate / 1e9:8.2f} GB/s' if isinstance(rate, float) else '       –'}")
    kernel = f"E-step, K = {facts['n_components']} {facts['covariance_type']}, {facts['device']}"
    lines.append(f"  {kernel:<38}{_number(facts['kernel_rows']) / 1e6:8.2f} M rows/s")
    lines.append(
        f"a pass: {_number(facts['pass_seconds']):.3g} s from disk, limited by {facts['bottleneck']}; "
        f"{_number(facts['cached_pass_seconds']):.3g} s from the page cache, limited by {facts['cached_bottleneck']}"
    )
    return lines


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)
