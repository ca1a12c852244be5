"""Indexes in files: written whole or not at all, their lists inside them or mapped from a file beside."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgmm.ann.assignment import Progress
from streamgmm.ann.coding import Coding
from streamgmm.ann.faiss_index import IndexFacts, import_faiss, index_job, put
from streamgmm.ann.policies import Policy
from streamgmm.errors import DataError, RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.storage import parse_json, read_small, require_folder, write_atomic

_SHARD_BYTES = 1 << 30


def write_index(
    output: str | Path,
    source: Any,
    model: Any,
    policy: Policy | str | None = None,
    *,
    copies: float | None = None,
    temperature: float = 1.0,
    coding: Coding | None = None,
    ids: NDArray[np.int64] | None = None,
    settings: InferenceSettings | None = None,
    on_disk: bool = False,
    shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> IndexFacts:
    """`build_index`, written to ``output`` with ``output.json`` beside it.

    ``on_disk`` keeps the lists in ``output.ivfdata``, which searches map into memory; building then holds
    ``shard_bytes`` of vectors, and needs room for them twice on disk.
    """
    output = Path(output)
    if output.suffix != ".faiss":
        raise RequestError(f"{output}: an index is written to .faiss; give the output this ending")
    data, beside = output.with_name(f"{output.name}.ivfdata"), output.with_name(f"{output.name}.json")
    require_folder(output)
    if not overwrite and (output.exists() or data.exists()):
        raise RequestError(f"{output}: exists; remove it, name another output, or allow --overwrite")
    faiss = import_faiss(str(output))
    job = index_job(source, model, policy, copies, temperature, coding, ids, settings)
    folder = output.with_name(f".{output.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        index = job.empty()
        shards: list[Path] = []
        # An empty index of its own: shards are read back beside it.
        trained = faiss.clone_index(index) if on_disk else None
        held = 0
        for part in job.parts():
            held += put(index, part, ids) * (index.code_size + 8)
            if progress is not None:
                progress(len(part.lists))
            if on_disk and held >= shard_bytes:
                shards.append(_write_shard(faiss, index, folder, len(shards)))
                held = 0
        if trained is not None:
            shards.append(_write_shard(faiss, index, folder, len(shards)))
            _merge(faiss, trained, shards, folder / "ivfdata", data)
            index = trained
        faiss.write_index(index, str(folder / "index"))
        write_atomic(folder / "facts", json.dumps(asdict(job.facts)).encode())
        if on_disk:
            (folder / "ivfdata").replace(data)
        (folder / "facts").replace(beside)
        (folder / "index").replace(output)
        if not on_disk:
            data.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return job.facts


def read_index(path: str | Path) -> tuple[Any, IndexFacts]:
    """An index that `write_index` wrote, or any IVF index of faiss's: its vectors are then counted.

    Raises
    ------
    DataError
        It is missing, damaged, or no IVF index.
    """
    path = Path(path)
    faiss = import_faiss(str(path))
    if not path.is_file():
        raise DataError(f"{path}: no such file; give an index that faiss wrote")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR)
    except RuntimeError as error:
        raise DataError(f"{path}: faiss cannot read it ({_reason(error)}); make it again") from None
    if not isinstance(index, faiss.IndexIVF):
        raise DataError(f"{path}: is a {type(index).__name__}, without lists; give an IVF index")
    try:
        told = parse_json(read_small(path.with_name(f"{path.name}.json")))
        facts = IndexFacts(**told) if isinstance(told, dict) else None
    except (OSError, ValueError, TypeError, RecursionError):
        facts = None
    return index, facts or _counted(faiss, index)


def _write_shard(faiss: Any, index: Any, folder: Path, number: int) -> Path:
    path = folder / f"shard{number}"
    faiss.write_index(index, str(path))
    index.reset()
    return path


def _merge(faiss: Any, index: Any, shards: list[Path], written: Path, final: Path) -> None:
    from faiss.contrib.ondisk import merge_ondisk

    with _silent():
        merge_ondisk(index, [str(path) for path in shards], str(written))
    lists = faiss.downcast_InvertedLists(index.invlists)
    lists.filename = str(final)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the library prints: it would stand among a command's own lines, or behind its last."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _counted(faiss: Any, index: Any) -> IndexFacts:
    """How often the most frequent id of a foreign index occurs, by counting."""
    lists = index.invlists
    parts = [
        faiss.rev_swig_ptr(lists.get_ids(k), size).copy() for k in range(index.nlist) if (size := lists.list_size(k))
    ]
    if not parts:
        return IndexFacts(1, 0)
    _, times = np.unique(np.concatenate(parts), return_counts=True)
    return IndexFacts(int(times.max()), len(times))


def _reason(error: Exception) -> str:
    """The last line of faiss's message, which begins with its source's place."""
    return " ".join(str(error).split())[-120:]
