"""``streamgmm assign``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from streamgmm.ann.assignment import assign as assign_source
from streamgmm.ann.policies import DEFAULT_POLICY, POLICIES, Policy
from streamgmm.ann.postings import imbalance
from streamgmm.ann.quantizer import quantizer_of
from streamgmm.ann.vectorchord import write_vectorchord
from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.cli.streaming import Bar, fitted_rows, rows_option, spare
from streamgmm.errors import DataError, RequestError

Command = Callable[..., Any]


def policy_options(command: Command) -> Command:
    """Options that say which lists a vector is stored in."""
    options = [
        click.option("--policy", type=click.Choice(POLICIES), default=DEFAULT_POLICY, show_default=True),
        click.option("--strength", type=float, metavar="λ", help="Of soar and air. [default: 1 and 0.5]"),
        click.option("--threshold", type=float, metavar="τ", help="Of resp (default 1/K); the gate of the others."),
        click.option("--copies", type=float, help="Mean lists a vector, solved on a sample instead of --threshold."),
        click.option("--max-copies", type=click.IntRange(1), help="Lists a vector at most; above 2 with resp only."),
        click.option("--temperature", type=float, default=1.0, show_default=True, help="Of responsibilities: r^(1/T)."),
        click.option("--ids", metavar="FILE", help="The vectors' ids, an .npy file of N int64; else row numbers."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def policy_of(
    name: str, strength: float | None, threshold: float | None, copies: float | None, max_copies: int | None
) -> Policy:
    """The policy that the options ask for."""
    if threshold is not None and copies is not None:
        raise RequestError("--threshold and --copies both say how many copies there are; give one of them")
    policy = Policy(name, strength, threshold)
    return policy if max_copies is None else replace(policy, max_copies=max_copies)


def read_ids(path: str | None) -> NDArray[np.int64] | None:
    """The ids in an ``.npy`` file, (N,) int64, mapped into memory."""
    if path is None:
        return None
    try:
        ids = np.load(path, mmap_mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); give an .npy file of int64") from None
    except (ValueError, EOFError):
        raise DataError(f"{path}: is no .npy file of numbers; give one of int64") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype != np.int64 or not len(ids):
        raise DataError(f"{path}: holds {getattr(ids, 'dtype', '?')} of shape {ids.shape}; give (N,) of int64")
    return ids


@contextmanager
def row_bar(total: int, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """What is told of rows that are done, and shows them on a terminal."""
    import sys

    bar: Bar = tqdm(total=total, unit=" rows", unit_scale=True, leave=False, disable=quiet or not sys.stderr.isatty())
    with bar:
        yield bar.update


@click.command(
    epilog="Example: streamgmm assign run vectors.zarr lists --copies 1.5. Interrupted? The same command goes on."
)
@click.argument("run", type=click.Path())
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@policy_options
@click.option("--resp", "keep_resp", is_flag=True, help="Write each entry's responsibility too (policy resp).")
@click.option("--vectorchord", metavar="FILE", type=click.Path(path_type=Path), help="Write VectorChord's table, SQL.")
@click.option("--overwrite", is_flag=True, help="Replace posting lists at OUT.")
@rows_option
@add_computing
@as_json
def assign(
    run: str,
    data: tuple[str, ...],
    out: Path,
    policy: str,
    strength: float | None,
    threshold: float | None,
    copies: float | None,
    max_copies: int | None,
    temperature: float,
    ids: str | None,
    keep_resp: bool,
    vectorchord: Path | None,
    overwrite: bool,
    rows: str,
    computing: Computing,
    as_json: bool,
) -> None:
    """Write the posting lists of DATA to the folder OUT: which vectors each component of the model in RUN keeps.

    RUN is a run, a model file, or a file of centroids. OUT holds centroids.npy (K, D) float32, offsets.npy (K+1) int64,
    ids.npy int64 and, with --resp, resp.npy float32: list k is ids[offsets[k]:offsets[k+1]].
    """
    begun = time.perf_counter()
    wanted = policy_of(policy, strength, threshold, copies, max_copies)
    quantizer, own_ids = quantizer_of(run), read_ids(ids)
    source = fitted_rows(run, one_path(data), rows, computing.cache)
    spare(data, out)
    if vectorchord is not None:
        # Before the pass, not after it.
        spare((*data, run), vectorchord)
        if not vectorchord.parent.is_dir() or vectorchord.is_dir():
            raise RequestError(f"--vectorchord: {vectorchord} cannot be written; name a file in a folder that exists")
    with row_bar(source.shape[0], quiet=as_json) as progress:
        postings = assign_source(
            source,
            quantizer,
            out,
            wanted,
            copies=copies,
            temperature=temperature,
            keep_resp=keep_resp,
            ids=own_ids,
            settings=computing.inference(),
            overwrite=overwrite,
            progress=progress,
        )
    if vectorchord is not None:
        write_vectorchord(vectorchord, quantizer)
    facts = {name: postings.facts[name] for name in ("n_samples", "n_lists", "n_entries", "copies", "max_copies")}
    sizes = postings.sizes
    facts |= {
        "policy": postings.facts["policy"],
        "empty_lists": int((sizes == 0).sum()),
        "longest_list": int(sizes.max()),
        "imbalance": imbalance(sizes),
        "written": [str(out), *([] if vectorchord is None else [str(vectorchord)])],
        "resumed": postings.facts["resumed"],
        "seconds": time.perf_counter() - begun,
        "digest": quantizer.digest,
    }
    lines = [
        f"{facts['n_samples']:,} vectors in {facts['n_lists']:,} lists, {facts['copies']:.3f} lists a vector: {out}",
        f"longest list {facts['longest_list']:,}, {facts['empty_lists']} empty, imbalance {facts['imbalance']:.2f}",
    ]
    print_result(facts, lines, as_json=as_json)
