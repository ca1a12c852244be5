"""Reaching a Dask scheduler, and seeing that its workers can do this package's work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streamgmm.errors import RequestError
from streamgmm.io.wording import reason_of

ANSWER_SECONDS = 10
"""How long a scheduler may take to answer, and workers to come."""


class NoWorkersError(RequestError):
    """A scheduler without workers that answer."""


@contextmanager
def connected(scheduler: Any) -> Iterator[Any]:
    """A client of ``scheduler``: of an address one of its own, closed at the end; a `distributed.Client` as it is.

    Raises
    ------
    RequestError
        It is neither, distributed is not installed, or nobody answers there.
    """
    client = open_client(scheduler)
    try:
        yield client
    finally:
        if client is not scheduler:
            client.close()


def open_client(scheduler: Any) -> Any:
    """As `connected`; who gets another client than ``scheduler`` closes it."""
    if is_client(scheduler):
        return scheduler
    if not isinstance(scheduler, str) or "://" not in scheduler:
        raise RequestError(
            f"scheduler must be threads, processes or an address such as tcp://host:8786; got {scheduler!r}"
        )
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        raise RequestError(
            f"scheduler {scheduler!r}: needs Dask's distributed; pip install 'streamgmm[cluster]', or use threads"
        ) from None
    try:
        return distributed.Client(scheduler, timeout=ANSWER_SECONDS, set_as_default=False)
    # distributed raises OSError, TimeoutError, ValueError, … for addresses that lead nowhere.
    except Exception as error:
        raise RequestError(
            f"scheduler {scheduler}: does not answer within {ANSWER_SECONDS} s ({reason_of(error)[:120]}); check the "
            "address and that it runs"
        ) from None


def is_client(scheduler: object) -> bool:
    """Whether it is a `distributed.Client`; whoever holds one has imported distributed."""
    distributed = sys.modules.get("distributed")
    return distributed is not None and isinstance(scheduler, distributed.Client)


def address_of(client: Any) -> str:
    """The scheduler's address, for messages."""
    return str(getattr(client.scheduler, "address", "client"))


def check_workers(client: Any, module: str) -> list[str]:
    """The addresses of all workers, each of which can import ``module`` of this package.

    Workers that went away meanwhile are left out.

    Raises
    ------
    RequestError
        There are none, or one of them cannot import it.
    """
    scheduler = address_of(client)
    try:
        client.wait_for_workers(1, timeout=ANSWER_SECONDS)
    except Exception:
        raise NoWorkersError(f"scheduler {scheduler}: has no workers; start one with dask worker {scheduler}") from None
    # The builtin travels to any worker; a function of this package would not.
    answers = client.run(importlib.import_module, module, on_error="return")
    for worker, answer in answers.items():
        if isinstance(answer, Exception) and not isinstance(answer, OSError):
            raise RequestError(
                f"scheduler {scheduler}: worker {worker} cannot import streamgmm ({reason_of(answer)[:160]}); install "
                "there what is installed here"
            )
    found = sorted(worker for worker, answer in answers.items() if not isinstance(answer, Exception))
    if not found:
        raise NoWorkersError(f"scheduler {scheduler}: no worker answers; check that they run")
    return found
