"""Slots that reader threads fill while the kernel works: storage → pinned host memory → device.

On a CUDA device rows cross under the running kernel (`to_device`). On a CPU the chunk is the slot itself, which is
filled again once the next chunk is asked for.

Chunks that a tier has room for are read, or copied, into their place there, and need neither slot nor buffer again.
On a device they may stay in a narrower form, into which they are brought after their first use; whoever then finds that
it does not do for some rows asks for these as they are stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from streamgmm.io.driver import can_copy
from streamgmm.io.intake import (
    DEVICE_BUFFERS,
    PATIENCE_SECONDS,
    SLOTS,
    Ahead,
    Chunk,
    Intake,
    Planned,
    Reading,
    typed,
)
from streamgmm.io.on_device import OnDevice
from streamgmm.io.plan import Span
from streamgmm.io.reading import SpanReader
from streamgmm.io.residency import Narrowing, Tier, cached_rows
from streamgmm.io.sending import Sender, sends
from streamgmm.io.sources.base import Source
from streamgmm.io.to_device import ToDevice
from streamgmm.io.traffic import Traffic

STALL_SECONDS = 30.0
"""A read that makes no progress for so long is told of."""


class Ring:
    """Streams spans of a source to a device, in order, through buffers allocated once.

    Rows that lie in memory already are handed to a CPU where they are, and copied from there to a GPU if that memory is
    pinned.

    Parameters
    ----------
    source : Source
    chunk_rows : int
        Rows of the largest span.
    device : torch.device
    threads : int
        Reader threads. Their number changes the speed and nothing else.
    host_memory : int, optional
        Bytes of host memory for rows. On a GPU, and for data that must be decoded, what the slots leave of it keeps the
        first chunks; else that many bytes of the data's beginning are left in the page cache. What does not fit is read
        past the page cache. None: nothing is kept, and caching is left to the system.
    device_memory : int
        Bytes of a GPU's memory, besides the buffers, that keep the first chunks.
    recheck : bool
        Whether rows that are not in memory come with checksums whenever they are read, not only where `stream` asks
        for them.
    notify : callable, optional
        Told, in a line, what the user should know: a read that stalls (again after every ``stall_seconds``), a file
        system without ``O_DIRECT``. Called from `stream`; what it raises ends the stream.
    stall_seconds : float
    """

    def __init__(
        self,
        source: Source,
        chunk_rows: int,
        device: torch.device,
        threads: int,
        *,
        host_memory: int | None = None,
        device_memory: int = 0,
        recheck: bool = False,
        notify: Callable[[str], None] | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._source, self._device, self._notify = source, device, notify or (lambda text: None)
        on_gpu = device.type == "cuda"
        rows = min(chunk_rows, source.shape[0])
        allocate = _pinned if on_gpu else _pageable
        size = rows * source.shape[1] * source.dtype.itemsize
        # The allocator of pinned memory would round it up anyway.
        slot = 1 << (size - 1).bit_length() if on_gpu else size
        resident = host_memory is not None and (on_gpu or source.read_path in ("decode", "objects"))
        budget = max(0, (host_memory or 0) - SLOTS * slot)
        reader = SpanReader(
            source, threads, cached_rows(source, host_memory, resident=resident), self._notify, stall_seconds
        )
        self._reader = reader
        self._intake = Intake(
            source,
            device,
            reader,
            allocate=partial(allocate, slot),
            buffers=[typed(self._device_block(size), source) for _ in range(DEVICE_BUFFERS * on_gpu)],
            on_host=Tier(budget if resident else 0, allocate),
            on_device=OnDevice(Tier(device_memory if on_gpu else 0, self._device_block, exact=True)),
            sender=Sender(source, rows, device, allocate) if on_gpu and can_copy() and sends(source) else None,
            recheck=recheck,
        )

    @property
    def traffic(self) -> Traffic:
        """What was moved; one that was given counts on."""
        return self._reader.traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self._reader.traffic = traffic

    def keep_as(self, narrowing: Narrowing | None) -> None:
        """Keep rows on the device in this form from now on; None: as they are stored, as in the beginning.

        What was kept before is dropped. To be called while nothing is streamed.
        """
        self._intake.on_device.keep_as(narrowing)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of another size do not fit, and would be held beside the new ones

    @property
    def narrowing_pays(self) -> bool:
        """Whether few enough of the narrow rows had to be read again as they are stored."""
        return self._intake.on_device.narrowing_pays

    def stream(self, spans: Iterable[Span], checked_rows: int = 0) -> Generator[Chunk]:
        """Chunks of ``spans``, in order, the first ``checked_rows`` rows with checksums.

        Reading runs ahead by as many slots as there are, or as there are buffers for what is sent on; ``spans`` is
        asked for more as it goes, so that one that continues with the next pass has its chunks read while this one
        ends.

        Raises
        ------
        DataError
            From a reader thread, at the chunk it belongs to.
        """
        planned = Ahead(_with_checks(spans, checked_rows))
        if self._device.type == "cuda":
            return ToDevice(planned, self._intake, self._device).chunks()
        return self._stream_on_host(planned)

    def _stream_on_host(self, spans: Ahead) -> Generator[Chunk]:
        intake, reading = self._intake, deque[Reading]()
        free = deque(intake.slots)
        try:
            while True:
                intake.ahead(spans, reading, free, deque())
                if not reading:
                    return
                item = reading[0]
                intake.finish(item)
                reading.popleft()
                yield Chunk(item.span, item.rows, None if item.units is None else partial(_coming, item.units))
                if item.slot is not None:
                    free.append(item.slot)
        finally:
            intake.give_up(reading)

    def _device_block(self, size: int) -> Tensor:
        block = torch.empty(size, dtype=torch.uint8, device=self._device)
        # It may still be read by a kernel for which it was freed, and copies do not wait for kernels.
        torch.cuda.current_stream(self._device).synchronize()
        return block

    def close(self) -> None:
        """Stop the reader threads and let go of all memory; a thread that hangs in a read is left behind, and the
        process may end without it.
        """
        if not self._reader.close(PATIENCE_SECONDS):
            self._notify(f"{self._source.name}: a read has not ended and is left behind; check the disk or the network")
        # Whoever still holds the ring, for its figures, holds no memory with it.
        self._intake.let_go()

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_checks(spans: Iterable[Span], checked_rows: int) -> Iterator[Planned]:
    """Each span, and whether it belongs to the first ``checked_rows`` rows."""
    planned = 0
    for span in spans:
        yield span, planned < checked_rows
        planned += span.rows


def _coming(units: Future[bytes]) -> Callable[[], bytes]:
    return units.result


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _pageable(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
