"""Which device does the work."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from streamgmm.errors import RequestError


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1`` as a device; what is asked for by name and missing raises.

    Of several processes on a machine, ``local_rank`` takes the GPU of that number, which becomes torch's current one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        return _gpu_of(local_rank, name)
    if name != "cpu" and not name.startswith("cuda"):
        raise RequestError(f"device must be auto, cpu or cuda; got {name!r}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise RequestError(f"device {name!r} was asked for and {count} CUDA devices are there; use device='cpu'")
    return device


def _gpu_of(local_rank: int, name: str) -> torch.device:
    if name != "cuda":
        raise RequestError(f"device {name!r} is one for all processes; use device='cuda', each then takes its own")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise RequestError(
            f"process {local_rank} of this machine has no GPU: {count} are there; start one for each GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def compute_workers(device: torch.device, processes: int = 1) -> int:
    """Threads that compute: one a core on a CPU that ``processes`` share, one that launches kernels on a GPU."""
    return max(1, (os.cpu_count() or 1) // processes) if device.type == "cpu" else 1


def on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
