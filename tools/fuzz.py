"""Hostile bytes against everything that reads bytes from strangers, guided by coverage.

    python -m tools.fuzz npy --runs 20000            # one target, by atheris (`pip install atheris`)
    python -m tools.fuzz all --runs 10000            # every target, one after the other
    python -m tools.fuzz --replay tests/reliability/corpus

The promise: whatever the bytes, an answer, or one error of one line; no other exception, no crash, no more than ten
seconds or 2 GiB of memory. An input that breaks it is kept in ``--artifacts``; once mended it belongs in
``tests/reliability/corpus/TARGET``, which the test suite replays. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, FEATURES = 6, 3
TIMEOUT_S, MEMORY_MIB = 10, 2048

Check = Callable[[Path, bytes], None]


def instrumented() -> Any:
    """atheris, with every module that parses imported so that its branches are seen."""
    import atheris

    with atheris.instrument_imports(include=["streamgmm", "zarr.core.metadata", "zarr.codecs", "click"]):
        import streamgmm.cli
        import streamgmm.io.sources  # noqa: F401
    import numpy.lib.format as npy_format

    for name in ("_read_array_header", "_filter_header", "read_magic", "descr_to_dtype"):
        function = getattr(npy_format, name, None)
        if function is not None:
            setattr(npy_format, name, atheris.instrument_func(function))
    return atheris


class BrokenPromiseError(AssertionError):
    """What a person would have seen that nobody should."""


def open_and_read(path: Path) -> None:
    """Open a data set, read its ends, and what tells it from others; an error must be ours, one line, and name it."""
    from streamgmm.errors import StreamGMMError
    from streamgmm.io.sources import open_source

    try:
        source = open_source(path)
        try:
            n = source.shape[0]
            source.read(0, min(n, 2))
            source.read(max(0, n - 2), n)
            assert len(source.fingerprint) == 64
            source.locate(n - 1)
        finally:
            source.close()
    except StreamGMMError as error:
        one_line(error, path)


def one_line(error: BaseException, path: Path) -> None:
    text = str(error)
    if "\n" in text or len(text) > 2000 or path.name not in text:
        raise BrokenPromiseError(text)


def data_file(name: str) -> Check:
    def check(folder: Path, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        open_and_read(path)

    return check


def zarr_metadata(name: str) -> Check:
    """``zarr.json`` or ``.zarray`` beside a chunk that is whole."""

    def check(folder: Path, data: bytes) -> None:
        array = folder / "x.zarr"
        chunk = array / ("c/0/0" if name == "zarr.json" else "0.0")
        if not chunk.exists():
            chunk.parent.mkdir(parents=True, exist_ok=True)
            chunk.write_bytes(bytes(ROWS * FEATURES * 4))
        (array / name).write_bytes(data)
        open_and_read(array)

    return check


def zarr_shard(folder: Path, data: bytes) -> None:
    """A shard with any index, whose own checksum is put right: the entries are believed no more for that."""
    import google_crc32c

    array = folder / "x.zarr"
    shard = array / "c" / "0" / "0"
    shard.parent.mkdir(parents=True, exist_ok=True)
    (array / "zarr.json").write_bytes(seeds("zarr_shard_json")[0])
    index_bytes = 3 * 16
    index = data[-index_bytes:]
    shard.write_bytes(data + google_crc32c.value(index).to_bytes(4, "little"))
    open_and_read(array)


def tensors(folder: Path, data: bytes) -> None:
    from streamgmm.errors import StreamGMMError
    from streamgmm.mixture import load_model

    path = folder / "x.safetensors"
    path.write_bytes(data)
    try:
        load_model(path)
    except StreamGMMError as error:
        one_line(error, path)


def settings(folder: Path, data: bytes) -> None:
    from streamgmm.errors import StreamGMMError
    from streamgmm.run import RunFolder, read_settings

    path = folder / "config.json"
    path.write_bytes(data)
    try:
        found = read_settings(folder)
        run = RunFolder(folder)
        try:
            (folder / "model.safetensors").touch()
            run.begin({"tol": 0.0, "max_iter": 3})
        finally:
            run.close()
        assert isinstance(found, dict)
    except StreamGMMError as error:
        one_line(error, folder)


HOSTILE = (
    None, True, False, 0, -1, 7, 2**31, 2**63, -(2**63), 10**400, 1e308, -1.5, float("inf"), "", "x", "\x00", "full",
    "tied", [], {}, [[]], [0], [[0, 0]], [[10**9, True]], {"a": 1}, "é" * 1000, [0] * 1000,
)  # fmt: skip


def checkpoint(folder: Path, data: bytes) -> None:
    """A valid checkpoint in which some facts and arrays were exchanged and the checksum was put right."""
    import numpy as np
    import torch

    from streamgmm.checkpoint import load_state
    from streamgmm.errors import StreamGMMError
    from streamgmm.storage import load_tensors, save_tensors

    whole = folder / "whole.safetensors"
    if not whole.exists():
        whole.write_bytes(seeds("checkpoint_file")[0])
    arrays, facts = load_tensors(whole)
    choices = iter(data)

    def choose(count: int) -> int:
        return next(choices, 0) % max(1, count)

    for _ in range(1 + choose(3)):
        if choose(2):
            place: Any = facts
            key: Any = sorted(place)[choose(len(place))]
            while isinstance(place[key], (dict, list)) and place[key] and choose(4):
                place = place[key]
                key = sorted(place)[choose(len(place))] if isinstance(place, dict) else choose(len(place))
            place[key] = HOSTILE[choose(len(HOSTILE))]
        else:
            name = sorted(arrays)[choose(len(arrays))]
            array = arrays[name]
            with np.errstate(invalid="ignore"):  # values put in before may fit no integer
                arrays[name] = (
                    array.astype(np.float32), array.reshape(-1)[:-1], array[..., None], np.full_like(array, np.nan),
                    array.astype(np.int64), np.zeros(0), np.zeros((0, 3)), -array, np.zeros((1,) * 9),
                )[choose(9)]  # fmt: skip
    path = folder / "x.safetensors"
    with contextlib.suppress(RecursionError, ValueError):
        save_tensors(path, arrays, facts)
    try:
        load_state(path, torch.device("cpu"))
    except StreamGMMError as error:
        one_line(error, path)


WORDS = (
    "fit", "info", "score", "predict", "sample", "verify", "demo", "report", "bench", "assign", "index", "evaluate",
    "x.npy", "run", "out.npy", "absent", "", ".", "..", "/dev/null", "/proc/self/mem", "x.npy::y", "-", "--",
    "-k", "--covariance", "full", "--output", "--max-iter", "--max-passes", "--tol", "--seed", "--device", "cpu",
    "cuda:99", "--memory", "64MiB", "1e99GiB", "--chunk-rows", "--init", "random", "--precision", "highest", "--n-init",
    "--checkpoint-every", "--fresh", "--json", "--threads", "--top", "--proba", "--overwrite", "--debug", "--help",
    "--holdout", "--algorithm", "--model", "kmeans", "--nonfinite", "skip", "--host-memory", "--against", "--version",
    "0", "1", "2", "3", "-1", "0.5", "nan", "inf", "-inf", "1e400", "99999999999999999999", "1,2", "é", "\udcff", "%s",
)  # fmt: skip
# They would work for long, draw pictures, or ask the machine instead of the arguments.
SKIPPED = {"demo", "bench", "index", "report", "evaluate"}


def command_line(folder: Path, data: bytes) -> None:
    """Words of the command line in any order, or any other words; at most three iterations are really run."""
    from streamgmm import cli
    from streamgmm.storage import load_tensors  # noqa: F401 - imported before anything is changed

    arguments, position = [], 0
    while position < len(data) and len(arguments) < 14:
        if data[position] == 255:  # a word of the fuzzer's own
            length = data[position + 1] % 9 if position + 1 < len(data) else 0
            # The system ends an argument at its first null byte.
            word = data[position + 2 : position + 2 + length].replace(b"\0", b"").decode(errors="surrogateescape")
            position += 2 + length
        else:
            word = WORDS[data[position] % len(WORDS)]
            position += 1
        arguments.append(word)
    if not arguments or SKIPPED & set(arguments):
        return
    x = folder / "x.npy"
    if not x.exists():
        x.write_bytes(seeds("rows")[0])
    with contextlib.chdir(folder), few_iterations():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(arguments)
            except SystemExit as done:
                status = int(done.code or 0)
            except Exception:
                if "--debug" not in arguments:
                    raise
                return
    told = [line for line in err.getvalue().splitlines() if line.startswith("streamgmm: error: ")]
    if status not in (0, 2) and "out of memory" not in err.getvalue():
        raise BrokenPromiseError(f"{arguments}: {status} {err.getvalue()}")
    if (status == 0) != (not told) or len(told) > 1 or "Traceback" in err.getvalue():
        raise BrokenPromiseError(f"{arguments}: {status} {err.getvalue()}")


@contextlib.contextmanager
def few_iterations() -> Any:
    """Arguments are what is tried here, not patience."""
    from dataclasses import replace

    from streamgmm.cli import fit as _  # noqa: F401

    module = sys.modules["streamgmm.cli.fit"]
    real = module.fit_source  # type: ignore[attr-defined]

    def short(source: Any, request: Any, *others: Any, **more: Any) -> Any:
        if min(request.max_iter, request.max_passes) > 3:
            request = replace(request, max_iter=min(request.max_iter, 3))
        return real(source, request, *others, **more)

    module.fit_source = short  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.fit_source = real  # type: ignore[attr-defined]


TARGETS: dict[str, Check] = {
    "npy": data_file("x.npy"),
    "fbin": data_file("x.fbin"),
    "u8bin": data_file("x.u8bin"),
    "fvecs": data_file("x.fvecs"),
    "bvecs": data_file("x.bvecs"),
    "hdf5": data_file("x.h5"),
    "parquet": data_file("x.parquet"),
    "arrow": data_file("x.arrow"),
    "zarr_json": zarr_metadata("zarr.json"),
    "zarr_v2": zarr_metadata(".zarray"),
    "zarr_shard": zarr_shard,
    "tensors": tensors,
    "checkpoint": checkpoint,
    "settings": settings,
    "command_line": command_line,
}


def seeds(target: str) -> list[bytes]:
    """Valid inputs from which the fuzzer starts."""
    import numpy as np

    rows = np.arange(ROWS * FEATURES, dtype=np.float32).reshape(ROWS, FEATURES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return _SEEDS[target](folder, rows) if target in _SEEDS else [b"{}"]


def _npy(folder: Path, rows: Any) -> list[bytes]:
    import numpy as np

    files = []
    for array in (rows, np.asfortranarray(rows), rows.astype(">f8"), rows.astype(np.int8), rows.astype("V2")):
        np.save(folder / "x.npy", array, allow_pickle=False)
        files.append((folder / "x.npy").read_bytes())
    return files


def _counted(dtype: str) -> Callable[[Path, Any], list[bytes]]:
    return lambda folder, rows: [rows.shape[0].to_bytes(4, "little") + rows.shape[1].to_bytes(4, "little")
                                 + rows.astype(dtype).tobytes()]  # fmt: skip


def _vecs(dtype: str) -> Callable[[Path, Any], list[bytes]]:
    return lambda folder, rows: [b"".join(len(row).to_bytes(4, "little") + row.astype(dtype).tobytes() for row in rows)]


def _hdf5(folder: Path, rows: Any) -> list[bytes]:
    import h5py

    files = []
    for options in ({}, {"chunks": (2, FEATURES), "compression": "gzip"}):
        with h5py.File(folder / "x.h5", "w") as file:
            file.create_dataset("x", data=rows, **options)
        files.append((folder / "x.h5").read_bytes())
    return files


def _arrow(folder: Path, rows: Any) -> list[bytes]:
    import pyarrow as arrow

    table = arrow.table({"x": arrow.FixedSizeListArray.from_arrays(arrow.array(rows.ravel()), FEATURES)})
    with arrow.OSFile(str(folder / "x"), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return [(folder / "x").read_bytes()]


def _parquet(folder: Path, rows: Any) -> list[bytes]:
    import pyarrow as arrow
    from pyarrow import parquet

    table = arrow.table({"x": arrow.FixedSizeListArray.from_arrays(arrow.array(rows.ravel()), FEATURES)})
    parquet.write_table(table, folder / "x", row_group_size=2)
    return [(folder / "x").read_bytes()]


def _zarr(part: str, **options: Any) -> Callable[[Path, Any], list[bytes]]:
    def make(folder: Path, rows: Any) -> list[bytes]:
        import zarr

        chunks = {"chunks": (2, FEATURES), "shards": rows.shape} if "shard" in part else {"chunks": rows.shape}
        array = zarr.create_array(
            folder / "x.zarr", shape=rows.shape, dtype=rows.dtype, compressors=None, **chunks, **options
        )
        array[:] = rows
        if part == "shard":
            return [(folder / "x.zarr" / "c" / "0" / "0").read_bytes()[:-4]]
        return [(folder / "x.zarr" / (".zarray" if options else "zarr.json")).read_bytes()]

    return make


def _model(folder: Path, rows: Any) -> list[bytes]:
    import numpy as np

    from streamgmm.mixture import Mixture

    Mixture(np.ones(1), rows[:1].astype(np.float64), np.ones((1, FEATURES)), "diag").save(folder / "m")
    return [(folder / "m").read_bytes()]


def _checkpoint(folder: Path, rows: Any) -> list[bytes]:
    from tests.test_checkpoint import HISTORY, IDENTITY, save_state, state_of

    save_state(folder / "c", state_of("diag"), HISTORY, IDENTITY)
    return [(folder / "c").read_bytes()]


def _words(folder: Path, rows: Any) -> list[bytes]:
    lines = (
        "fit x.npy -k 2 --output run --max-iter 2", "info x.npy --json", "score run x.npy", "verify x.npy",
        "predict run x.npy out.npy --top 1 --proba", "fit x.npy -k 3 --covariance full --seed 1 --init random",
    )  # fmt: skip
    return [bytes(WORDS.index(word) for word in line.split()) for line in lines]


_SEEDS: dict[str, Callable[[Path, Any], list[bytes]]] = {
    "npy": _npy,
    "rows": _npy,
    "fbin": _counted("<f4"),
    "u8bin": _counted("u1"),
    "fvecs": _vecs("<f4"),
    "bvecs": _vecs("u1"),
    "hdf5": _hdf5,
    "arrow": _arrow,
    "parquet": _parquet,
    "zarr_json": lambda folder, rows: _zarr("json")(folder, rows) + _zarr("shard_json")(folder / "s", rows),
    "zarr_v2": _zarr("json", zarr_format=2),
    "zarr_shard": _zarr("shard"),
    "zarr_shard_json": _zarr("shard_json"),
    "tensors": _model,
    "checkpoint": lambda folder, rows: [bytes(range(9)), bytes(range(100, 120))],
    "checkpoint_file": _checkpoint,
    "settings": lambda folder, rows: [json.dumps({"tol": 0.0, "max_iter": 3, "shape": [1, 2]}).encode()],
    "command_line": _words,
}


def check(target: str, data: bytes) -> None:
    """Raise unless ``data`` gives an answer or one clear error."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        TARGETS[target](Path(name), data)


def replay(corpus: Path) -> int:
    """Check every file of ``corpus/TARGET/``; the number checked."""
    files = sorted(path for path in corpus.glob("*/*") if path.is_file() and path.parent.name in TARGETS)
    for path in files:
        check(path.parent.name, path.read_bytes())
    return len(files)


def fuzz(target: str, runs: int, seed: int, artifacts: Path) -> None:
    """Let atheris try ``runs`` inputs; ends the process."""
    import warnings

    warnings.simplefilter("ignore")
    atheris = instrumented()
    artifacts.mkdir(parents=True, exist_ok=True)
    corpus = Path(tempfile.mkdtemp(prefix=f"streamgmm-fuzz-{target}-"))
    for number, data in enumerate(seeds(target)):
        (corpus / f"seed{number}").write_bytes(data)
    known = Path(__file__).parents[1] / "tests" / "reliability" / "corpus" / target
    options = [
        # libFuzzer's own alarm does not survive torch; what hangs is told by Python, with the place.
        f"-runs={runs}", f"-seed={seed or 1}", "-timeout=1000000", f"-rss_limit_mb={MEMORY_MIB}", "-max_len=4096",
        f"-artifact_prefix={artifacts}/{target}-", "-print_final_stats=1",
    ]  # fmt: skip
    folders = [str(corpus), *([str(known)] if known.is_dir() else [])]
    current = artifacts / f"{target}-current"

    def within_time(data: bytes) -> None:
        current.write_bytes(data)
        faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
        check(target, data)
        faulthandler.cancel_dump_traceback_later()

    atheris.Setup(["fuzz", *options, *folders], within_time)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=[*TARGETS, "all"])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--artifacts", type=Path, default=Path("fuzz-artifacts"))
    parser.add_argument("--replay", type=Path)
    arguments = parser.parse_args()
    if arguments.replay is not None:
        print(json.dumps({"replayed": replay(arguments.replay)}))
        return 0
    if arguments.target != "all":
        fuzz(arguments.target, arguments.runs, arguments.seed, arguments.artifacts)
    return fuzz_all(arguments.runs, arguments.seed, arguments.artifacts)


def fuzz_all(runs: int, seed: int, artifacts: Path) -> int:
    """Every target in a process of its own; one JSON line in the end."""
    artifacts.mkdir(parents=True, exist_ok=True)
    begun, facts, failed = time.perf_counter(), {}, []
    for target in TARGETS:
        command = [sys.executable, "-m", "tools.fuzz", target, f"--runs={runs}", f"--seed={seed}"]
        done = subprocess.run([*command, f"--artifacts={artifacts}"], capture_output=True, text=True, errors="replace")
        executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        branches = re.findall(r"cov: (\d+)", done.stderr)
        facts[target] = {
            "cases": int(executed[1]) if executed else 0,
            "branches": int(branches[-1]) if branches else 0,
            "status": done.returncode,
        }
        if done.returncode:
            failed.append(target)
            (artifacts / f"{target}.log").write_text(done.stderr[-20_000:])
        print(f"{target:<14} {facts[target]}", file=sys.stderr, flush=True)
    cases = sum(fact["cases"] for fact in facts.values())
    print(json.dumps({"cases": cases, "failed": failed, "targets": facts, "seconds": time.perf_counter() - begun}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
