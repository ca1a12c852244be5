"""`streamgmm fit` and `score` on the data sets: held-out likelihood after every pass, and what was read for it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from passes_bench.datasets import DataSet
from passes_bench.tables import Run
from streamgmm.fitting import fit
from streamgmm.inference import InferenceSettings, mean_log_likelihood
from streamgmm.io.ring import Ring
from streamgmm.io.sources import open_source
from streamgmm.mixture import Mixture
from streamgmm.recorder import Progress
from streamgmm.request import FitRequest
from streamgmm.state import TrainingState

REG_COVAR = 1e-5
"""Of a mean variance of one. Flat patches of photographs vary by 3.6e-4: with 1e-3, EM on them was not monotone."""

BUDGET = 0.1
"""Rows in memory, of all there are: what every method starts from."""

BASELINE = "em"

WAYS: Mapping[str, Mapping[str, object]] = {
    BASELINE: {"algorithm": "em", "max_iter": 30},
    "stepwise": {"algorithm": "stepwise"},
    "em, SQUAREM": {"algorithm": "em", "max_iter": 30, "accelerate": "squarem"},
    "stepwise, 12 passes": {"algorithm": "stepwise", "max_passes": 12.0},
    "stepwise, 12 passes, SQUAREM": {"algorithm": "stepwise", "max_passes": 12.0, "accelerate": "squarem"},
    **{
        f"stepwise, sample of {share:g}": {"algorithm": "stepwise", "share": share} for share in (0.025, 0.05, 0.2, 0.4)
    },
}
"""What `FitRequest` is told besides data, size and seed; ``share`` is the sample's, of all rows."""

USUAL = "^stepwise$"
"""Beside the baseline, where nothing else is asked for."""


class AfterEachPass(Progress):
    """The mixtures that passes begin with, and the rows read before each."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Mixture]] = {}

    def chunk(self, state: TrainingState, n_samples: int, ring: Ring) -> None:
        # Of a pass's first step: its mixture is that of the pass before.
        if state.step == 0 and state.number not in self.seen:
            self.seen[state.number] = (state.rows_read - state.rows_summed(n_samples), state.candidates[0].mixture)


def run(data: DataSet, n_components: int, seed: int, covariance_type: str, method: str, device: str = "auto") -> Run:
    """One line of the output: the product's own fit of a file, with a sample of a tenth of its rows.

    ``curve`` is the held-out mean log-likelihood in nats before the first pass after the sample and after each, and
    ``rows`` what had been read by then, in passes.
    """
    n, d = data.training.shape
    told = dict(WAYS[method])
    sampled = int(float(str(told.pop("share", BUDGET))) * n)
    asked = FitRequest(
        n_components,
        covariance_type,
        tol=0.0,
        reg_covar=REG_COVAR,
        seed=seed,
        device=device,
        sample_rows=sampled,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{data.name}.npy"
        np.save(path, data.training)
        watching, begun = AfterEachPass(), time.perf_counter()
        result = fit(open_source(str(path)), replace(asked, **told), progress=watching)
        seconds = time.perf_counter() - begun
    settings = InferenceSettings(torch.device("cpu"), "high")
    held_out = open_source(data.held_out)
    curve = [mean_log_likelihood(held_out, mixture, settings) for _, mixture in watching.seen.values()]
    curve.append(mean_log_likelihood(held_out, result.mixture, settings))
    return {
        "data": data.name,
        "n": n,
        "d": d,
        "k": n_components,
        "seed": seed,
        "covariance": covariance_type,
        "method": method,
        "sample": sampled,
        "passes": result.n_passes,
        "bytes_read": result.bytes_read,
        "seconds": round(seconds, 1),
        "rows": [*(rows / n for rows, _ in watching.seen.values()), result.n_passes],
        "curve": [round(value, 5) for value in curve],
        "undone": sum(bool(record.get("undone")) for record in result.history),
        "why": result.why,
        "digest": result.mixture.digest,
    }
