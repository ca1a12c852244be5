"""What moved on the data's way, and which part of it sets the pace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

WAITING_SHARE = 0.1
"""Reading sets the pace where the consumer stands waiting for more of the time than this."""

COPYING_SHARE = 0.8
"""The link does, else, where it is busy for more of the time than this."""


@dataclass
class Traffic:
    """Sums since the ring was made.

    Attributes
    ----------
    rows : int
        Rows handed out.
    bytes_read : int
        Bytes of the rows that were read from the source (or taken from memory where they lay); narrow rows of the
        device that were wanted as stored count once more.
    bytes_decoded : int
        Of these, the ones that passed through a codec or a conversion.
    bytes_uncached : int
        Of these, the ones read past the page cache.
    bytes_from_host, bytes_from_device : int
        Bytes, as stored, of rows that lay resident in host or device memory, whatever form they lay in.
    bytes_copied : int
        Bytes copied to the device.
    seconds_waiting : float
        How long the consumer stood waiting for rows.
    seconds_reading, seconds_decoding : float
        Time that reader threads were at work, added up, and how much of it they were computing.
    seconds_copying : float
        Time that copies of slots to the device took, on the device's clock.
    seconds_sending : float
        Time of ``seconds_reading`` that reader threads waited for the device to take what they sent on.
    storage_before : int
        Bytes that the process had fetched from storage at the beginning.
    """

    rows: int = 0
    bytes_read: int = 0
    bytes_decoded: int = 0
    bytes_uncached: int = 0
    bytes_from_host: int = 0
    bytes_from_device: int = 0
    bytes_copied: int = 0
    seconds_waiting: float = 0.0
    seconds_reading: float = 0.0
    seconds_decoding: float = 0.0
    seconds_copying: float = 0.0
    seconds_sending: float = 0.0
    storage_before: int = field(default_factory=lambda: bytes_from_storage())

    @property
    def bytes_from_disk(self) -> int:
        """Bytes that the process fetched from storage meanwhile, as Linux counts: read-ahead and all other files too.

        The rest of ``bytes_read`` was in the page cache. 0 where the system does not tell.
        """
        return bytes_from_storage() - self.storage_before

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes handed out that came from ``device``, ``host``, ``page_cache`` and ``disk``."""
        disk = min(self.bytes_from_disk, self.bytes_read)
        cached = self.bytes_read - disk
        return {"device": self.bytes_from_device, "host": self.bytes_from_host, "page_cache": cached, "disk": disk}

    @property
    def hit_rates(self) -> dict[str, float]:
        """Shares of all bytes handed out, counted as stored, so of all rows, by tier."""
        return shares([self.bytes_by_tier])


def shares(tiers: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Each tier's share of all bytes that several `Traffic.bytes_by_tier` name; empty where there are none."""
    total = sum(sum(each.values()) for each in tiers)
    return {name: sum(each[name] for each in tiers) / total for name in tiers[0]} if total else {}


def bottleneck(traffic: Traffic, seconds: float) -> str:
    """What limits a run that took ``seconds``: ``disk``, ``decode``, ``link`` or ``kernel``.

    Every stage works ahead of the next one, so a consumer that waits is waiting for the slowest stage. ``disk`` stands
    for all that is not computing: device, network, page cache.
    """
    if traffic.seconds_waiting > WAITING_SHARE * seconds:
        decoded = 2 * traffic.bytes_decoded > traffic.bytes_read
        computing = 2 * traffic.seconds_decoding > traffic.seconds_reading
        sending = 2 * traffic.seconds_sending > traffic.seconds_reading
        return "decode" if decoded and computing else "link" if sending else "disk"
    return "link" if traffic.seconds_copying > COPYING_SHARE * seconds else "kernel"


def bytes_from_storage() -> int:
    """Bytes that this process has fetched from storage so far; 0 where the system does not tell."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "read_bytes":
                return int(value)
    return 0
