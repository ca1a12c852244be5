"""The parameters that every estimator here has and scikit-learn's do not: how to compute."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions

from streamgmm.device import resolve_device
from streamgmm.fitting import fit as fit_source
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources.base import Source
from streamgmm.kernels import PRECISIONS
from streamgmm.precision import CHECK_ROWS
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.units import parse_bytes

_FEW_ROWS = 4 * CHECK_ROWS


class Streamed:
    """What ``device``, ``precision``, ``memory_limit``, ``chunk_rows``, ``checkpoint``, ``sample_rows`` and
    ``random_state`` mean."""

    _stream_constraints: ClassVar[dict[str, list[Any]]] = {
        "random_state": ["random_state"],
        "device": [str],
        "precision": [StrOptions({"auto", *PRECISIONS})],
        "memory_limit": [str, Interval(Integral, 1, None, closed="left"), None],
        "chunk_rows": [Interval(Integral, 1, None, closed="left"), None],
        "checkpoint": [str, os.PathLike, None],
        "sample_rows": [Interval(Integral, 1, None, closed="left"), None],
    }

    random_state: Any
    device: str
    precision: str
    memory_limit: str | int | None
    chunk_rows: int | None
    checkpoint: str | Path | None
    sample_rows: int | None

    def _fitted(self, source: Source, request: FitRequest, progress: Progress, client: Any) -> FitResult:
        """The fit that is asked for: here, or on the workers of ``client``."""
        if client is None:
            return fit_source(source, request, self._run(), progress)
        from streamgmm.cluster.fitting import fit_on

        return fit_on(client, source, request, self._run(), progress)

    def _inference(self, source: Source) -> InferenceSettings:
        return InferenceSettings(resolve_device(self.device), self._precision(source), self._limit(), self.chunk_rows)

    def _precision(self, source: Source, client: Any = None) -> str:
        if self.precision != "auto" or self._device_type(client) != "cpu":
            return self.precision
        # Checking a narrower one at every iteration would take longer than few rows take in fp64.
        return "highest" if source.dtype == np.float64 or source.shape[0] <= _FEW_ROWS else "auto"

    def _device_type(self, client: Any) -> str:
        if client is None:
            return resolve_device(self.device).type
        from streamgmm.cluster.fitting import device_on

        return device_on(client, self.device).partition(":")[0]

    def _limit(self) -> int | None:
        return None if self.memory_limit is None else parse_bytes(self.memory_limit, "memory_limit")

    def _run(self) -> Path | None:
        return None if self.checkpoint is None else Path(self.checkpoint)

    def _seed(self) -> int:
        seed = self.random_state
        return int(seed if isinstance(seed, Integral) else check_random_state(seed).randint(2**31))
