"""The whole line on a CUDA device: the same bits however it is run, and fp64's answer."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from streamgmm.fitting import fit
from streamgmm.inference import InferenceSettings, mean_log_likelihood, posteriors
from streamgmm.io.ring import Ring
from streamgmm.io.sources.array import ArraySource
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.seeding import Start
from tests.kills import Killed, KilledAt
from tests.oracles import COVARIANCE_TYPES, clustered

pytestmark = pytest.mark.gpu

ROWS = clustered(500_003, 40, 48, spread=1.0).astype(np.float32)


def request(kind: str, **changes: object) -> FitRequest:
    return FitRequest(32, **{"covariance_type": kind, "max_iter": 4, "tol": 0.0, "device": "cuda", **changes})


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_chunks_threads_memory_and_kills_change_no_bit(kind, tmp_path):
    source = ArraySource(ROWS)
    whole = fit(source, request(kind))
    again = fit(source, request(kind))
    other = fit(source, request(kind, chunk_rows=16_384, threads=1))
    tight = fit(source, request(kind, memory_limit=900 << 20))
    assert {whole.mixture.digest} == {result.mixture.digest for result in (again, other, tight)}
    run = tmp_path / "run"
    for chunks in (2, 5):
        with pytest.raises(Killed):
            fit(source, request(kind, chunk_rows=65_536, checkpoint_every=0.0), run, KilledAt(chunks))
    resumed = fit(source, request(kind), run)
    assert resumed.resumed
    assert resumed.mixture.digest == whole.mixture.digest
    assert resumed.lower_bounds == whole.lower_bounds


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("precision", ["medium", "high", "auto"])
def test_agrees_with_fp64_on_the_cpu(kind, precision):
    source = ArraySource(ROWS[:120_001])
    # The same start for both: seeding on another device may draw other centres.
    start = fit(source, request(kind, max_iter=0, device="cpu")).mixture
    given = Start(start.weights, start.means, start.precisions)
    ours = fit(source, request(kind, start=given, precision=precision))
    exact = fit(source, request(kind, start=given, precision="highest", device="cpu"))
    bound = 1e-2 if precision != "high" else 2e-4
    assert np.abs(np.subtract(ours.lower_bounds, exact.lower_bounds)).max() < bound
    assert np.abs(ours.mixture.means - exact.mixture.means).max() < 10 * bound


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_inference(kind):
    source = ArraySource(ROWS[:100_003])
    mixture = fit(source, request(kind)).mixture
    on = {
        name: InferenceSettings(torch.device(name), "highest" if name == "cpu" else "auto") for name in ("cpu", "cuda")
    }
    likelihood = {name: mean_log_likelihood(source, mixture, settings) for name, settings in on.items()}
    assert abs(likelihood["cpu"] - likelihood["cuda"]) < 1e-2
    labels = {
        name: np.concatenate([chunk.labels for chunk in posteriors(source, mixture, 3, settings)])
        for name, settings in on.items()
    }
    assert (labels["cpu"][:, 0] == labels["cuda"][:, 0]).mean() > 0.999


@pytest.mark.parametrize("kind", ["spherical", "diag"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("changes", [{"precision": "medium"}, {}, {"holdout": 0.1}], ids=str)
def test_more_rows_stay_in_16_bits_than_would_as_stored(kind, dtype, changes, monkeypatch):
    rows = ROWS.astype(dtype)
    rows[200_123] *= 1e4  # one granule is wanted as it is stored in every pass, if the sample does not scale it

    def with_room(share: float) -> FitResult:
        room = int(share * rows.nbytes)
        monkeypatch.setattr("streamgmm.job.Ring", lambda *own, **named: Ring(*own, **{**named, "device_memory": room}))
        # A component of that row alone would have a mean and a precision that medium cannot multiply.
        return fit(ArraySource(rows), request(kind, chunk_rows=16_384, reg_covar=1.0, **changes))

    without, some = with_room(0.0), with_room(0.6 * 4 / rows.itemsize)
    assert without.mixture.digest == some.mixture.digest
    assert without.lower_bounds == some.lower_bounds
    assert [model.evaluation for model in without.models] == [model.evaluation for model in some.models]
    assert without.hit_rates["device"] == 0
    if changes.get("precision") == "medium":
        # Of four passes the first finds nothing. As stored it would be 45 %, or half of that.
        assert some.hit_rates["device"] > 0.65


def test_device_memory_stays_within_the_limit():
    gc.collect()
    before = torch.cuda.memory_allocated()  # by other tests of this process
    torch.cuda.reset_peak_memory_stats()
    limit = 600 << 20
    result = fit(ArraySource(np.tile(ROWS, (6, 1))), request("diag", memory_limit=limit))
    assert 0 < result.peak_device_bytes - before < limit
