"""`streamgmm prepare` beside plain Dask and plain zarr writing, turn by turn in one run, memory measured.

    python tools/bench_prepare.py [--rows 5000000] [--features 64] [--folder /tmp] [--memory 1GiB] [--output FILE]

Makes an ``.npy`` file of float32 and turns it into the same sharded Zarr v3 layout (1 MiB chunks with a CRC-32C, 64 MiB
shards)

* by a copy of its bytes (`shutil`, the ceiling of this disk),
* by plain zarr: ``array[a:b] = memmap[a:b]``, a shard at a time,
* by plain Dask: `dask.array.store` into a pre-created array, a task a shard,
* by `prepare`, without steps, with ``--shuffle --ids``, and with ``standardise,pca=32``.

Each in a process of its own, with what it holds at most above what it held before; every result is compared with a
straight computation of the same rows. At last a shuffle is killed in the middle and resumed, and its shards compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 1 << 16


def write_rows(path: Path, n: int, d: int) -> None:
    """Row i begins with i modulo 2²⁴; the rest is noise of several scales, so that principal directions differ."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    rng, scales = np.random.default_rng(0), np.linspace(1, 4, d, dtype=np.float32)
    for start in range(0, n, PIECE):
        part = rng.standard_normal((min(PIECE, n - start), d), dtype=np.float32) * scales
        part[:, 0] = np.arange(start, start + len(part)) % 2**24
        array[start : start + len(part)] = part
    array.flush()


def created(path: Path, n: int, d: int) -> Any:
    """An array with the layout that `prepare` chooses."""
    import zarr
    from zarr.codecs import Crc32cCodec

    from streamgmm.prepare.shards import SHARD_BYTES, Layout

    layout = Layout.of((n, d), "float32", SHARD_BYTES)
    return zarr.create_array(
        path,
        shape=(n, d),
        dtype="float32",
        chunks=(layout.chunk_rows, d),
        shards=(layout.shard_rows, d),
        compressors=[Crc32cCodec()],
        config={"write_empty_chunks": True},
    )


def by_copy(source: Path, target: Path, memory: str) -> None:
    shutil.copyfile(source, target)


def by_zarr(source: Path, target: Path, memory: str) -> None:
    rows = np.load(source, mmap_mode="r")
    array = created(target, *rows.shape)
    step = array.shards[0]
    for start in range(0, len(rows), step):
        array[start : start + step] = rows[start : start + step]


def by_dask(source: Path, target: Path, memory: str) -> None:
    import dask.array

    rows = np.load(source, mmap_mode="r")
    array = created(target, *rows.shape)
    dask.array.store(dask.array.from_array(rows, chunks=array.shards), array, lock=False)


def by_prepare(**settings: Any) -> Callable[[Path, Path, str], None]:
    def work(source: Path, target: Path, memory: str) -> None:
        from streamgmm.prepare import prepare

        prepare(source, target, memory=memory, **settings)

    return work


WAYS: dict[str, Callable[[Path, Path, str], None]] = {
    "copy": by_copy,
    "plain zarr": by_zarr,
    "plain dask": by_dask,
    "prepare": by_prepare(),
    "prepare --shuffle --ids": by_prepare(shuffle=True, ids=True),
    "prepare --steps standardise,pca=32": by_prepare(steps="standardise,pca=32"),
}


def run_one(name: str, source: Path, target: Path, memory: str) -> None:
    """In a process of its own: seconds, with what was written flushed, and growth."""
    import dask.array  # noqa: F401 - what every way would import, so that growth is of the work alone
    import zarr  # noqa: F401

    import streamgmm.prepare  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of importing, is forgotten
    before = resident("VmRSS")
    begun = time.perf_counter()
    WAYS[name](source, target, memory)
    os.sync()
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "grown": resident("VmHWM") - before}))


def resident(name: str) -> int:
    """Bytes of this process that are (VmRSS), or were at most (VmHWM), in memory; mapped pages of files counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def check(name: str, source: Path, target: Path) -> None:
    """Every row against a straight computation."""
    from streamgmm import open_source

    rows = np.load(source, mmap_mode="r")
    if name == "copy":
        return
    found = open_source(target)
    ids_path = target.with_name(f"{target.stem}.ids.zarr")
    seen: np.ndarray = np.zeros(len(rows), dtype=bool)
    transformation = found.transformation
    for start in range(0, len(rows), PIECE):
        stop = min(start + PIECE, len(rows))
        if ids_path.exists():
            import zarr

            numbers = np.asarray(zarr.open_array(ids_path, mode="r")[start:stop])
            seen[numbers] = True
            expected = rows[numbers]
        else:
            seen[start:stop] = True
            expected = rows[start:stop]
        if transformation is not None:
            expected = transformation.apply(np.asarray(expected))
        assert found.read(start, stop).tobytes() == np.ascontiguousarray(expected).tobytes(), (name, start)
    assert seen.all(), name


def child(name: str, source: Path, target: Path, memory: str) -> list[str]:
    arguments = ["--one", name, "--source", str(source), "--target", str(target), "--memory", memory]
    return [sys.executable, __file__, *arguments]


def killed_and_resumed(source: Path, folder: Path, memory: str, seconds: float) -> dict[str, Any]:
    """A shuffle killed after 30 % and 70 % of its time, then finished; its shards against an undisturbed one's."""
    name, target = "prepare --shuffle --ids", folder / "killed.zarr"
    for share in (0.3, 0.7):
        process = subprocess.Popen(child(name, source, target, memory))
        workspace = target.with_name(f"{target.name}.preparing")
        while not workspace.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(share * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    begun = time.perf_counter()
    subprocess.run(child(name, source, target, memory), check=True, stdout=subprocess.DEVNULL)
    resumed = time.perf_counter() - begun
    manifests = [json.loads((folder / each / "manifest.json").read_text()) for each in ("whole.zarr", "killed.zarr")]
    assert manifests[0]["shards"] == manifests[1]["shards"]
    return {"way": "killed twice, resumed", "seconds": resumed, "resumed": manifests[1]["result"]["resumed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--output", type=Path)
    for name in ("--one", "--source", "--target"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, Path(arguments.source), Path(arguments.target), arguments.memory)
        return
    folder = Path(tempfile.mkdtemp(prefix="streamgmm-prepare-", dir=arguments.folder))
    found: list[dict[str, Any]] = []
    try:
        source = folder / "x.npy"
        write_rows(source, arguments.rows, arguments.features)
        size = source.stat().st_size
        print(f"{arguments.rows:,} × {arguments.features} float32, {size / 1e9:.2f} GB, --memory {arguments.memory}")
        for name in WAYS:
            target = folder / ("whole.zarr" if "shuffle" in name else "y.zarr" if name != "copy" else "y.npy")
            done = subprocess.run(
                child(name, source, target, arguments.memory), check=True, capture_output=True, text=True
            )
            facts = json.loads(done.stdout.splitlines()[-1])
            check(name, source, target)
            found.append({"way": name, "gb_per_s": size / facts["seconds"] / 1e9, **facts})
            print(
                f"{name:<36}{facts['seconds']:8.2f} s{found[-1]['gb_per_s']:8.2f} GB/s{facts['grown'] / 2**20:8.0f} MiB"
            )
            if "shuffle" not in name:
                shutil.rmtree(target) if target.is_dir() else target.unlink()
        shuffled = next(facts["seconds"] for facts in found if "shuffle" in facts["way"])
        found.append(killed_and_resumed(source, folder, arguments.memory, shuffled))
        print(f"{found[-1]['way']:<36}{found[-1]['seconds']:8.2f} s, the same shards")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(each) + "\n" for each in found))


if __name__ == "__main__":
    main()
