"""Which lists each row goes into, a chunk at a time: a policy laid over streamed rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgmm.ann.listing import stream_lists
from streamgmm.ann.nearest import stream_nearest
from streamgmm.ann.policies import NO_LIST, Policy, lists_above, lists_of, second_lists, threshold_for
from streamgmm.ann.quantizer import Quantizer, tempered
from streamgmm.device import compute_workers
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings, frame_of_mixture, posteriors
from streamgmm.io.bfloat16 import as_tensor, values
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source
from streamgmm.mixture import Mixture
from streamgmm.precision import CHECK_ROWS, choose_precision, first_precision
from streamgmm.seeding import check_finite, uniform_rows

NO_ID = -1
"""What searches give where there is no neighbour; its distance is infinite."""

SAMPLE_ROWS = 65_536
"""Rows on which a target number of copies is solved."""


@dataclass(frozen=True, eq=False)
class Assigned:
    """Some rows' lists, in row order.

    Attributes
    ----------
    start : int
        The first row.
    lists : (n, columns) int32 array
        -1 behind the last.
    resp : (n, columns) float32 array or None
        Responsibilities, for the policy ``resp``.
    rows : (n, D) tensor or None
        The rows themselves, of the stored type, where they are at hand; valid until the next are asked for.
    """

    start: int
    lists: NDArray[np.int32]
    resp: NDArray[np.float32] | None
    rows: Tensor | None = None


def check(
    source: Source, quantizer: Quantizer, policy: Policy, ids: NDArray[np.int64] | None, *, keep_resp: bool = False
) -> None:
    """Raise RequestError for what no assignment of ``source`` can meet."""
    quantizer.check_features(source.name, source.shape[1])
    if policy.name == "resp" and not quantizer.has_responsibilities:
        raise RequestError(
            "policy 'resp' needs a mixture, and centroids alone have none; use policy air, or give a RUN"
        )
    if keep_resp and policy.name != "resp":
        raise RequestError(f"responsibilities are kept with policy 'resp' only; got {policy.name!r}")
    if ids is None:
        return
    if not isinstance(ids, np.ndarray) or ids.shape != (source.shape[0],) or ids.dtype != np.int64:
        got = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else f"a {type(ids).__name__}"
        raise RequestError(f"ids must be an array of {source.shape[0]} int64 numbers, one a row; got {got}")
    _check_different(ids)


def _check_different(ids: NDArray[np.int64]) -> None:
    """Raise RequestError where two rows have one id, or one has the id that means nothing was found."""
    if not (rising := bool((ids[1:] > ids[:-1]).all())):
        ids = np.sort(ids)
    again = np.flatnonzero(ids[1:] == ids[:-1]) if not rising else ids[:0]
    if len(again):
        raise RequestError(f"ids must differ, and {ids[again[0]]} is there twice; give each vector its own")
    at = int(np.searchsorted(ids, NO_ID))
    if at < len(ids) and ids[at] == NO_ID:
        raise RequestError(f"ids must not hold {NO_ID}, which searches give where there is no neighbour; use another")


def settle(
    source: Source,
    quantizer: Quantizer,
    policy: Policy,
    copies: float | None,
    temperature: float,
    settings: InferenceSettings,
) -> Policy:
    """``policy`` with the threshold that gives ``copies`` lists a vector on a sample of the rows; without, itself.

    Raises
    ------
    RequestError
        The policy cannot have so many copies.
    """
    if copies is None or policy.name == "top1":
        if copies not in (None, 1):
            raise RequestError(f"copies is {copies} and policy top1 has one list a vector; use another policy")
        return policy
    most = policy.columns(quantizer.n_lists)
    if not 1 <= copies <= most:
        raise RequestError(f"copies must be between 1 and {most} for policy {policy.name!r}; got {copies}")
    chosen = uniform_rows(source.shape[0], min(source.shape[0], SAMPLE_ROWS), np.random.default_rng(0))
    sample = open_source(values(source.gather(chosen)[0]))
    settings = replace(settings, memory_limit=None)
    if policy.name == "resp":
        mixture = tempered(quantizer.mixture, temperature)
        others = [part.resp[:, 1:] for part in posteriors(sample, mixture, most, settings)]
        ordered = np.sort(np.concatenate(others).ravel())[::-1]
        # The entries beyond the first of each row that are wanted, the most responsible ones.
        count = round((copies - 1) * sample.shape[0])
        return policy.with_threshold(float(ordered[count]) if count < len(ordered) else 0.0)
    if quantizer.n_lists < 2:
        return policy
    parts = stream_nearest(sample, quantizer, policy.candidates, settings)
    gains = torch.cat([second_lists(part.candidates, policy)[1].cpu() for part in parts])
    return policy.with_threshold(threshold_for(gains, copies))


def assignments(
    source: Source,
    quantizer: Quantizer,
    policy: Policy,
    temperature: float,
    settings: InferenceSettings,
    start: int = 0,
    *,
    with_rows: bool = False,
) -> Iterator[Assigned]:
    """The lists of every row from ``start`` on, a chunk at a time, in order. Raises as `assign`.

    Without rows a GPU works on the next chunk while the caller has this one's lists.
    """
    if policy.name == "resp":
        yield from _by_responsibility(source, quantizer, policy, temperature, settings, start)
        return
    m = 1 if policy.width == 1 else policy.candidates
    if policy.name == "top2":
        m = 2
    if settings.device.type == "cuda" and not with_rows:
        for first, lists in stream_lists(source, quantizer, m, policy, settings, start):
            yield Assigned(first, lists, None)
        return
    for part in stream_nearest(source, quantizer, m, settings, start):
        lists = lists_of(part.candidates, policy).cpu().numpy()
        yield Assigned(part.span.start, lists, None, part.rows)


def _by_responsibility(
    source: Source, quantizer: Quantizer, policy: Policy, temperature: float, settings: InferenceSettings, start: int
) -> Iterator[Assigned]:
    k = quantizer.n_lists
    threshold = 1 / k if policy.threshold is None else policy.threshold
    mixture = tempered(quantizer.mixture, temperature)
    settings = replace(settings, precision=_precision(source, mixture, settings))
    rows = source if start == 0 else _Tail(source, start)
    first = start
    for part in posteriors(rows, mixture, policy.columns(k), settings):
        lists = lists_above(torch.from_numpy(part.labels), torch.from_numpy(part.resp), threshold).numpy()
        yield Assigned(first, lists, np.where(lists == NO_LIST, np.float32(0), part.resp))
        first += len(lists)


def _precision(source: Source, mixture: Mixture, settings: InferenceSettings) -> str:
    """Chosen on all of the data, so that a pass over its end goes on in the same one."""
    if settings.precision != "auto":
        return settings.precision
    sample = uniform_rows(source.shape[0], min(source.shape[0], CHECK_ROWS), np.random.default_rng(0))
    rows, _ = source.gather(sample)
    check_finite(source, rows, sample)
    frame, workers = frame_of_mixture(mixture, source.dtype), compute_workers(settings.device)
    return choose_precision(mixture, frame, first_precision("auto"), as_tensor(rows).to(settings.device), workers)


class _Tail(Source):
    """Rows of a source from one on."""

    def __init__(self, source: Source, start: int) -> None:
        self._source, self._start = source, start
        self.name, self.dtype = source.name, source.dtype
        self.shape = (source.shape[0] - start, source.shape[1])
        self.read_granule, self.read_path = source.read_granule, source.read_path

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        self._source.read_into(self._start + start, self._start + stop, out)

    def locate(self, row: int) -> str:
        return self._source.locate(self._start + row)
