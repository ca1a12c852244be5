"""The workers of a cluster as the processes of one fit: who they are, and which place each takes."""

from __future__ import annotations

import os
import platform
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from streamgmm._version import __version__
from streamgmm.cluster.connecting import NoWorkersError, address_of, check_workers
from streamgmm.errors import RequestError
from streamgmm.statistics import SEGMENTS


@dataclass(frozen=True)
class Member:
    """What a worker says of itself.

    Attributes
    ----------
    address : str
        Dask's: ``tcp://10.0.0.5:40123``.
    machine : str
    process : int
    n_gpus : int
        CUDA devices that it sees.
    gpus : str
        Its ``CUDA_VISIBLE_DEVICES``.
    versions : tuple of (str, str)
        Of what the bits of a result depend on.
    """

    address: str
    machine: str
    process: int
    n_gpus: int
    gpus: str
    versions: tuple[tuple[str, str], ...]

    @property
    def host(self) -> str:
        """Where the other workers reach it."""
        return host_of(self.address)


def host_of(address: str) -> str:
    """The host in one of Dask's addresses."""
    return urlsplit(address).hostname or "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """What a process of `distributed.World` must know of itself: its rank among all, and among those of its machine."""

    member: Member
    rank: int
    size: int
    local_rank: int
    local_size: int


def describe(address: str = "") -> Member:
    """This process."""
    return Member(
        address,
        f"{socket.gethostname()} at {host_of(address)}",
        os.getpid(),
        torch.cuda.device_count() if torch.cuda.is_available() else 0,
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        (("streamgmm", __version__), ("torch", torch.__version__), ("Python", platform.python_version())),
    )


def members_of(client: Any) -> list[Member]:
    """The workers that can take part, at most as many as there are segments, neighbours on a machine together.

    Raises
    ------
    RequestError
        There are none; one lacks the package or has another version of it; or several share a process.
    """
    there = check_workers(client, "streamgmm.cluster.rank")
    answers = client.run(_describe_worker, workers=there, on_error="return")
    members = [answer for answer in answers.values() if isinstance(answer, Member)]
    if not members:
        raise NoWorkersError(f"scheduler {address_of(client)}: no worker answers; check that they run")
    own = describe()
    for member in members:
        for (name, theirs), (_, ours) in zip(member.versions, own.versions, strict=True):
            if theirs != ours:
                raise RequestError(
                    f"worker {member.address}: has {name} {theirs} and this process {ours}; install the same version"
                )
    shared = [process for process, n in Counter((each.machine, each.process) for each in members).items() if n > 1]
    if shared:
        raise RequestError(
            f"scheduler {address_of(client)}: its workers share process {shared[0][1]}, and a fit needs one each; "
            "start them as processes (LocalCluster(processes=True), dask worker --nworkers)"
        )
    return sorted(members, key=lambda each: (each.machine, each.address))[:SEGMENTS]


def _describe_worker(dask_worker: Any) -> Member:
    # Dask passes the worker to a parameter of this name.
    return describe(dask_worker.address)


def device_for(members: Sequence[Member], wanted: str) -> str:
    """``wanted``, with ``auto`` resolved: one kind of device for all, for another gives other bits.

    Raises
    ------
    RequestError
        Some have a GPU and some have none.
    """
    if wanted != "auto":
        return wanted
    with_gpus = [bool(member.n_gpus) for member in members]
    if any(with_gpus) and not all(with_gpus):
        without = members[with_gpus.index(False)].address
        raise RequestError(
            f"device 'auto': worker {without} sees no GPU and others do; use device='cpu', or only those"
        )
    return "cuda" if all(with_gpus) else "cpu"


def places_of(members: Sequence[Member]) -> list[Place]:
    """A rank for each, in order.

    Workers of one machine that were each given GPUs of their own (as dask-cuda does) take the first that they see;
    those that see the same ones take one each.
    """
    seen: Counter[str] = Counter()
    sizes = Counter(member.machine for member in members)
    masks = {machine: {each.gpus for each in members if each.machine == machine} for machine in sizes}
    places = []
    for rank, member in enumerate(members):
        own_gpus = len(masks[member.machine]) == sizes[member.machine]
        local = 0 if own_gpus else seen[member.machine]
        seen[member.machine] += 1
        places.append(Place(member, rank, len(members), local, sizes[member.machine]))
    return places
