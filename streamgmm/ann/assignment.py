"""Posting lists from a model and data, in one streamed pass."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.inversion import invert
from streamgmm.ann.placement import assignments, check, settle
from streamgmm.ann.policies import Policy
from streamgmm.ann.postings import FORMAT, PostingLists, is_postings
from streamgmm.ann.quantizer import quantizer_of
from streamgmm.ann.spill import Spill
from streamgmm.ann.tiling import SEARCH_VERSION, fused
from streamgmm.device import compute_workers
from streamgmm.errors import RequestError, RunError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source
from streamgmm.storage import require_folder, sync_folder, write_atomic
from streamgmm.transforms import FILE

_SORT_BYTES = 256 << 20
"""Of entries sorted at once, where a quarter of the memory limit is not less."""

Progress = Callable[[int], object]
"""Told of rows as they are done."""


def assign(
    source: Any,
    model: Any,
    output: str | Path,
    policy: Policy | str | None = None,
    *,
    copies: float | None = None,
    temperature: float = 1.0,
    keep_resp: bool = False,
    ids: NDArray[np.int64] | None = None,
    settings: InferenceSettings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PostingLists:
    """Write the posting lists of every row of ``source`` to the folder ``output``, which appears when it is complete.

    Interrupted at any instant, the same call goes on where it was; chunks, threads and memory change nothing.

    Parameters
    ----------
    source : anything `open_source` takes
    model : anything `quantizer_of` takes
    policy : Policy or name
        By default the one that is recommended.
    copies : float, optional
        Mean number of lists a vector, solved on a sample: it takes the place of the policy's threshold.
    temperature : float
        Of the responsibilities of the policy ``resp``: r^(1/T).
    keep_resp : bool
        Write each entry's responsibility too (policy ``resp`` only).
    ids : (N,) int64 array, optional
        Written instead of row numbers.
    settings : InferenceSettings, optional
        Device, memory, threads.
    overwrite : bool
        Replace other posting lists at ``output``.
    progress : callable, optional
        Told the number of rows done after every chunk, of rows found done too.

    Raises
    ------
    RequestError
        The policy does not fit the model, dimensions disagree, the memory limit cannot be met, or ``output`` exists.
    DataError
        A row holds NaN or infinity; file, row and column are named.
    RunError
        Another process is at work on ``output``.
    """
    source, quantizer, output = open_source(source), quantizer_of(model), Path(output)
    settings = settings or InferenceSettings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policy = Policy(policy) if isinstance(policy, str) else policy or Policy()
    check(source, quantizer, policy, ids, keep_resp=keep_resp)
    wanted = {
        "data": source.fingerprint,
        "model": quantizer.digest,
        "policy": asdict(policy),
        "copies": copies,
        "temperature": temperature,
        "keep_resp": keep_resp,
        "ids": None if ids is None else sha256(np.ascontiguousarray(ids).data).hexdigest(),
        "device": f"cuda {SEARCH_VERSION}" if fused(source.dtype, settings.device) else settings.device.type,
        "precision": settings.precision,
    }
    wanted = json.loads(json.dumps(wanted))
    there = _there(output, wanted, overwrite=overwrite)
    if there is not None:
        return there
    with _working_folder(output) as folder:
        policy = settle(source, quantizer, policy, copies, temperature, settings)
        columns = policy.columns(quantizer.n_lists)
        with Spill(folder, source.shape[0], columns, keep_resp, wanted) as spill:
            resumed, done = spill.resumed, progress or (lambda rows: None)
            done(spill.rows)
            for part in assignments(source, quantizer, policy, temperature, settings, spill.rows):
                spill.append(part.lists, part.resp if keep_resp else None)
                done(len(part.lists))
            spill.sync()
            result = folder / "result"
            shutil.rmtree(result, ignore_errors=True)
            result.mkdir()
            budget = min(_SORT_BYTES, (settings.memory_limit or 4 * _SORT_BYTES) // 4)
            workers = compute_workers(torch.device("cpu"))
            offsets = invert(spill, quantizer.n_lists, ids, result, folder, budget, workers)
        facts = {
            "format": FORMAT,
            "version": 1,
            "wanted": wanted,
            "n_samples": source.shape[0],
            "n_lists": quantizer.n_lists,
            "n_features": quantizer.n_features,
            "n_entries": int(offsets[-1]),
            "copies": int(offsets[-1]) / source.shape[0],
            "max_copies": columns,
            "policy": {**asdict(policy), "threshold": _finite(policy.threshold)},
            "own_ids": ids is not None,
            "resumed": resumed,
        }
        if source.transformation is not None:
            # Whoever uses the lists with raw vectors must know.
            source.transformation.save(result / FILE)
        np.save(result / "centroids.npy", quantizer.centroids)
        np.save(result / "offsets.npy", offsets)
        write_atomic(result / "postings.json", json.dumps(facts, indent=1, sort_keys=True).encode())
        _publish(result, output)
    return PostingLists.load(output)


def _there(output: Path, wanted: Mapping[str, object], *, overwrite: bool) -> PostingLists | None:
    """The posting lists at ``output`` if they are those that are wanted; None where they may be written."""
    if not output.exists():
        require_folder(output)
        return None
    if is_postings(output):
        there = PostingLists.load(output)
        if there.facts.get("wanted") == wanted:
            return replace(there, facts={**there.facts, "resumed": True})
        if not overwrite:
            raise RequestError(f"{output}: holds posting lists of other data or settings; name another, or --overwrite")
        return None
    if output.is_dir() and not any(output.iterdir()):
        return None
    raise RequestError(f"{output}: exists and holds no posting lists, so it is not replaced; name another output")


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """A private folder beside ``output``, kept for the next call unless this one succeeds."""
    folder = output.with_name(f".{output.name}.partial")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RequestError(f"{output}: cannot be written ({error.strerror}); name another output") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{output}: another process is working on it; wait for it, or name another") from None
        try:
            yield folder
        except BaseException:
            # What went wrong before anything was safe leaves nothing to go on from.
            if not (folder / "state.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _publish(result: Path, output: Path) -> None:
    sync_folder(result)
    if output.exists():
        aside = output.with_name(f".{output.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        output.rename(aside)
        result.rename(output)
        shutil.rmtree(aside)
    else:
        result.rename(output)
    sync_folder(output.parent)


def _finite(number: float | None) -> float | None:
    """JSON has no infinity."""
    return None if number is None or not np.isfinite(number) else number
