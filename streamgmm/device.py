"""Which device does the work."""

from __future__ import annotations

import os

import torch

from streamgmm.errors import RequestError


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1`` as a device; what is asked for by name and missing raises."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def compute_workers(device: torch.device) -> int:
    """Threads that compute: one a core on a CPU, one that launches kernels on a GPU."""
    return (os.cpu_count() or 1) if device.type == "cpu" else 1
