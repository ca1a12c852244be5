"""The chunks that stay on a device, as they are stored or in a narrower form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from streamgmm.errors import DataError
from streamgmm.io.bfloat16 import as_rows
from streamgmm.io.integrity import UNIT_BYTES, UNIT_ROWS, unit_checksums
from streamgmm.io.plan import Span
from streamgmm.io.residency import Narrowing, Tier
from streamgmm.io.sources.base import Source

_MOST_READ_AGAIN = 1 / 8
"""Reading more than this share of narrow rows again, one piece after the other, costs more than keeping them saves."""


class OnDevice:
    """A tier whose chunks may lie there in a narrower form, of which some rows are then wanted as they are stored.

    Attributes
    ----------
    narrowing : Narrowing or None
        The form; None where it is that of the stored rows.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.narrowing: Narrowing | None = None
        self._units = dict[Span, bytes]()
        self._rows_narrow = self._rows_again = 0

    def keep_as(self, narrowing: Narrowing | None) -> None:
        """Drop what is kept, and keep chunks in this form from now on."""
        self.narrowing, self._tier = narrowing, self._tier.emptied()
        self._units.clear()

    @property
    def narrowing_pays(self) -> bool:
        """Whether few enough of the narrow rows had to be read again as they are stored."""
        return self._rows_again <= _MOST_READ_AGAIN * self._rows_narrow

    def place(self, span: Span, size: int) -> Tensor | None:
        """Bytes for a span that takes ``size`` as it is stored, as `Tier.place`."""
        return self._tier.place(span, size if self.narrowing is None else self.narrowing.size(span.rows))

    def holds(self, span: Span) -> bool:
        """Whether the span's rows lie in its place."""
        return self._tier.holds(span)

    def hold(self, span: Span) -> None:
        """Its rows lie in its place now, if it has one."""
        self._tier.hold(span)

    def narrow(self, span: Span, rows: Tensor, place: Tensor, units: Callable[[], Callable[[], bytes]] | None) -> None:
        """Keep stored ``rows`` (n, D) of the device in the narrower form, in the order of the current stream.

        ``units``, as of a chunk, are their checksums where these were asked for; rows read again are compared with
        them. Where the device's memory does not suffice rows are not kept, and are read the next time.
        """
        assert self.narrowing is not None
        if self.holds(span):
            return
        with suppress(torch.OutOfMemoryError):
            self.narrowing.narrow(rows, place)
            if units is not None:
                self._units[span] = units()()
            self.hold(span)

    def handed_out(self, span: Span) -> None:
        """Count a chunk in the narrower form."""
        self._rows_narrow += span.rows

    def read_again(self, span: Span, first: int, rows: Tensor, source: Source) -> None:
        """Count and compare stored ``rows`` (n, D) of the host, those from ``first`` of the span on.

        Raises
        ------
        DataError
            They are not those that were narrowed, of which checksums were known.
        """
        self._rows_again += len(rows)
        units, last = self._units.get(span), first + len(rows)
        if units is None:
            return
        here, there = (-(-row // UNIT_ROWS) * UNIT_BYTES for row in (first, last))
        if unit_checksums(as_rows(rows)) != units[here:there]:
            raise DataError(
                f"{source.name}: changed since it was last read, between {source.locate(span.start + first)} and "
                f"{source.locate(span.start + last - 1)}; restore it, or start over with --fresh"
            )
