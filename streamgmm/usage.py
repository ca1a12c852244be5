"""What the processes of a fit took."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from streamgmm.distributed import Message
from streamgmm.feed import Feed
from streamgmm.io.traffic import bottleneck, shares
from streamgmm.job import Job


def usage_of(job: Job, feed: Feed, begun: float) -> dict[str, Any]:
    """What the processes took since ``begun``, on the leader: bytes added up; waiting, and memory, of the one that has
    most. The bottleneck is that of the process which waited longest: the others wait for it when the pass ends.
    """
    device, traffic = job.device, feed.ring.traffic
    numbers = {
        "bytes_streamed": traffic.bytes_read,
        "bytes_copied": traffic.bytes_copied,
        "seconds_waiting": traffic.seconds_waiting,
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }
    limit = bottleneck(traffic, time.perf_counter() - begun)
    own = Message({**numbers, "bottleneck": limit, "tiers": traffic.bytes_by_tier})
    all_of_them = [message.facts for message in job.world.gather(own)]
    if not all_of_them:
        return {}
    return {
        **{name: (sum if name.startswith("bytes") else max)(each[name] for each in all_of_them) for name in numbers},
        "bottleneck": max(all_of_them, key=lambda each: each["seconds_waiting"])["bottleneck"],
        "hit_rates": shares([each["tiers"] for each in all_of_them]),
        "n_processes": job.world.size,
    }


def peak_host_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
