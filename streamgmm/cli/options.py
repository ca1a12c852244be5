"""Options that several commands share, and how their answers are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from streamgmm.device import resolve_device
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.readers import reader_threads
from streamgmm.io.sources import Cache
from streamgmm.kernels import PRECISIONS
from streamgmm.units import parse_bytes

Command = Callable[..., Any]

threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=reader_threads,
    show_default="one a core, 4 to 16",
    help="Reader threads.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")


def warn(text: str) -> None:
    """A line on stderr about something that does not stop the command."""
    click.echo(f"streamgmm: warning: {text}", err=True)


@dataclass(frozen=True)
class Computing:
    """``--device --precision --memory --host-memory --chunk-rows --threads --cache``, of every command that streams."""

    device: str
    precision: str
    memory_limit: int | None
    host_memory: int | None
    chunk_rows: int | None
    threads: int
    cache: Cache | None

    def inference(self) -> InferenceSettings:
        return InferenceSettings(
            resolve_device(self.device),
            self.precision,
            self.memory_limit,
            self.chunk_rows,
            self.threads,
            self.host_memory,
            warn,
        )


def computing(command: Command) -> Command:
    """Add the options of `Computing`, which the command receives as ``computing``."""
    options = [
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option(
            "--precision",
            type=click.Choice(["auto", *PRECISIONS]),
            default="auto",
            show_default=True,
            help="highest is fp64; auto takes the fastest that agrees with it on a sample.",
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            help="Bound on device memory, or growth on a CPU, e.g. 4GiB; what is left keeps rows.",
        ),
        click.option("--host-memory", metavar="SIZE", help="Host memory that keeps rows between passes, e.g. 16GiB."),
        click.option("--chunk-rows", type=click.IntRange(1), help="Rows moved at once; never changes a result."),
        threads_option,
        click.option(
            "--cache", metavar="DIR", type=click.Path(path_type=Path), help="Keep objects of s3://, … in this folder."
        ),
        click.option("--cache-size", default="100GiB", show_default=True, metavar="SIZE", help="Of DIR, at most."),
    ]

    @wraps(command)
    def gathered(
        device: str,
        precision: str,
        memory: str | None,
        host_memory: str | None,
        chunk_rows: int | None,
        threads: int,
        cache: Path | None,
        cache_size: str,
        **others: Any,
    ) -> Any:
        kept = None if host_memory is None else parse_bytes(host_memory, "--host-memory")
        kept_here = None if cache is None else Cache(cache.absolute(), parse_bytes(cache_size, "--cache-size"))
        settings = Computing(device, precision, memory_limit(memory), kept, chunk_rows, threads, kept_here)
        return command(computing=settings, **others)

    for option in reversed(options):
        gathered = option(gathered)
    return gathered


def memory_limit(memory: str | None) -> int | None:
    """``--memory`` in bytes."""
    return None if memory is None else parse_bytes(memory, "--memory")


def print_result(facts: Mapping[str, object], lines: list[str], *, as_json: bool) -> None:
    """``lines`` for a person, or ``facts`` as one JSON line."""
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for line in lines:
            click.echo(line)


def one_path(paths: tuple[str, ...]) -> str | list[str]:
    """One path as itself, several as a list."""
    if not paths:
        raise RequestError("no data was named; give one path or more")
    return paths[0] if len(paths) == 1 else list(paths)
