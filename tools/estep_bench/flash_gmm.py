"""Flash-GMM: its public functions on the same rows, tuned by itself within a time of its own."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import Autotuner

from .clocks import back_to_back, milliseconds, once
from .errors import peer_errors
from .session import Record, Skipped
from .workloads import Workload

TUNING_S = 40.0
"""Seconds that a case may spend on compiling and tuning."""

FOR_HOPPER = {
    "spherical": ("flash_gmm_h100", "flash_gmm_estep"),
    "diag": ("flash_gmm_diag_h100", "flash_gmm_estep_diag"),
    "full": ("flash_gmm_full_h100", "flash_gmm_estep_full"),
}
FOR_ANY = ("flash_gmm", "flash_gmm_estep")

_given_up: set[str] = set()


def precision_of(n_features: int) -> str:
    """The type its products have: no configuration of its kernel for an H100 fits more than 512 features."""
    return "bfloat16" if n_features <= 512 else "tf32"


def measure_flash_gmm(case: Workload, repeats: int) -> Record:
    """One pass over the centred float32 rows."""
    kind, d = case.mixture.covariance_type, case.mixture.n_features
    module, function = FOR_HOPPER[kind] if precision_of(d) == "bfloat16" else FOR_ANY
    if module in _given_up:
        raise Skipped(f"{module} was given up before")
    library = importlib.import_module(module)
    e_step = getattr(library, function)
    device = case.rows.device

    def on_device(values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    x, means = case.rows - on_device(case.frame.shift), on_device(case.mixture.means - case.frame.shift)
    if kind == "full":
        # Theirs is the lower Cholesky factor of the precision.
        shapes = on_device(np.linalg.cholesky(np.linalg.inv(case.mixture.covariances)))
    else:
        shapes = on_device(np.log(case.mixture.covariances))
    weights = on_device(np.log(case.mixture.weights))
    wide = {"BLOCK_D": triton.next_power_of_2(d)} if module == FOR_ANY[0] else {}

    def work() -> Any:
        return e_step(x, means, shapes, weights, **wide)

    tune_within(library, TUNING_S)
    try:
        log_likelihood, counts, *_ = work()
    except Skipped:
        _given_up.add(module)
        raise
    return peer_errors(case, log_likelihood, counts) | {
        "ms": milliseconds(work, device, min(repeats, 5)),
        "queued_ms": back_to_back(work, device, min(repeats, 5)),
    }


def tune_within(library: ModuleType, seconds: float) -> None:
    """Let ``library`` choose among its own configurations, compiled side by side, for ``seconds`` from now.

    Nothing is cut short: past the deadline the configuration in hand is finished, then `Skipped` raised.
    """
    deadline = time.monotonic() + seconds
    for tuner in vars(library).values():
        if isinstance(tuner, Autotuner):
            tuner.do_bench = _few_runs(deadline)
            tuner.run = _compiled_first(tuner, deadline)


def _few_runs(deadline: float) -> Callable[..., list[float]]:
    """Times of a configuration: the median of three, or of one if it took twice as long as the best so far."""
    best = [float("inf")]

    def bench(call: Callable[[], object], quantiles: object) -> list[float]:
        if time.monotonic() > deadline:
            raise Skipped(f"not tuned within {TUNING_S:.0f} s")
        call()
        times = [once(call, torch.device("cuda"))]
        if times[0] < 2 * best[0]:
            times += [once(call, torch.device("cuda")) for _ in range(2)]
        best[0] = min(best[0], median(times))
        return [median(times)] * 3

    return bench


def _compiled_first(tuner: Any, deadline: float) -> Callable[..., Any]:
    """The tuner's ``run``, before whose first measurements all configurations are compiled."""
    tune = partial(Autotuner.run, tuner)
    seen: set[str] = set()

    def run(*arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        if (key := repr(sorted(constants.items()))) not in seen:
            seen.add(key)
            # What does not compile, the tuner finds out for itself.
            with (
                suppress(Exception),
                ThreadPoolExecutor(16) as pool,
                triton.AsyncCompileMode(pool, ignore_errors=True) as compiling,
            ):
                for config in tuner.configs:
                    tuner.fn.warmup(*arguments, grid=grid, **constants, **config.all_kwargs())
                wait(compiling.raw_futures, timeout=max(0.0, deadline - time.monotonic()))
                for pending in compiling.raw_futures:
                    pending.cancel()
        return tune(*arguments, grid=grid, warmup=warmup, **constants)

    return run
