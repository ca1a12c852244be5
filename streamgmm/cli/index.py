"""``streamgmm index``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from streamgmm.ann.coding import KINDS, Coding
from streamgmm.ann.faiss_files import write_index
from streamgmm.ann.policies import DEFAULT_POLICY
from streamgmm.ann.postings import PostingLists, is_postings
from streamgmm.ann.quantizer import quantizer_of
from streamgmm.cli.assign import policy_of, policy_options, read_ids, row_bar
from streamgmm.cli.options import Computing, as_json, one_path, print_result
from streamgmm.cli.options import computing as add_computing
from streamgmm.cli.streaming import fitted_rows, rows_option, spare
from streamgmm.errors import RequestError
from streamgmm.units import format_bytes, parse_bytes


@click.command(epilog="Example: streamgmm index run vectors.zarr vectors.faiss --kind pq --on-disk")
@click.argument("run", type=click.Path())
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(KINDS), default="flat", show_default=True, help="How vectors are stored.")
@click.option("--subspaces", type=click.IntRange(1), help="Of pq; divides D.  [default: about D/4]")
@click.option(
    "--bits", type=click.IntRange(1, 16), default=8, show_default=True, help="A subspace (pq), a feature (sq)."
)
@click.option("--on-disk", is_flag=True, help="Keep the lists in OUT.ivfdata, mapped while searching.")
@click.option("--shard", metavar="SIZE", default="1GiB", show_default=True, help="Held at once with --on-disk.")
@policy_options
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@rows_option
@add_computing
@as_json
def index(
    run: str,
    data: tuple[str, ...],
    out: Path,
    kind: str,
    subspaces: int | None,
    bits: int,
    on_disk: bool,
    shard: str,
    policy: str,
    strength: float | None,
    threshold: float | None,
    copies: float | None,
    max_copies: int | None,
    temperature: float,
    ids: str | None,
    overwrite: bool,
    rows: str,
    computing: Computing,
    as_json: bool,
) -> None:
    """Write a faiss index of DATA to OUT (.faiss), with the centroids of the model in RUN.

    RUN is a run, a model file, a file of centroids, or a folder that `assign` wrote, whose lists are then used. faiss
    returns a vector as often as it is stored: search with streamgmm.ann.Searcher, or fetch k × copies and deduplicate.
    """
    begun = time.perf_counter()
    wanted = policy_of(policy, strength, threshold, copies, max_copies)
    own_ids, coding = read_ids(ids), Coding(kind, subspaces, bits)
    source = fitted_rows(run, one_path(data), rows, computing.cache)
    spare(data, out)
    given = is_postings(run)
    if given and (wanted != policy_of(DEFAULT_POLICY, None, None, None, None) or copies is not None):
        raise RequestError(f"{run}: its lists are given, so --policy and its settings do nothing; leave them out")
    with row_bar(source.shape[0], quiet=as_json) as progress:
        facts = write_index(
            out,
            source,
            PostingLists.load(run) if given else quantizer_of(run),
            None if given else wanted,
            copies=copies,
            temperature=temperature,
            coding=coding,
            ids=own_ids,
            settings=computing.inference(),
            on_disk=on_disk,
            shard_bytes=parse_bytes(shard, "--shard"),
            overwrite=overwrite,
            progress=progress,
        )
    written = [
        path for path in (out, out.with_name(f"{out.name}.ivfdata"), out.with_name(f"{out.name}.json")) if path.exists()
    ]
    size = sum(path.stat().st_size for path in written)
    told = {
        "n_samples": facts.n_samples,
        "max_copies": facts.max_copies,
        "policy": facts.policy,
        "kind": facts.kind,
        "bytes": size,
        "written": [str(path) for path in written],
        "seconds": time.perf_counter() - begun,
        "digest": facts.digest,
    }
    print_result(told, [f"{facts.n_samples:,} vectors, {format_bytes(size)}: {out}"], as_json=as_json)
