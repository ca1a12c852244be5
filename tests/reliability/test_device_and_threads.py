"""A device without memory, and reader threads that die: one line, and what was saved goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from streamgmm import summing
from streamgmm.io.sources.npy import NpySource
from tests.cli.conftest import call, refused  # noqa: F401 - fixtures
from tests.oracles import clustered

FIT = ("fit", "x.npy", "-k", 3, "--max-iter", 4, "--tol", 0, "--device", "cpu", "--chunk-rows", 4096, "--json")
SAVED = ("--output", "run", "--checkpoint-every", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", clustered(70_000, 3, 4, spread=2.0).astype(np.float32))
    return tmp_path


def after(calls: int, error: BaseException, function: Callable, until: float = float("inf")) -> Callable:
    """``function``, which raises at every call after the first ``calls``."""
    count = 0

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if calls < count <= until:
            raise error
        return function(*arguments)

    return failing


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 MiB.")


@pytest.mark.parametrize("calls", [0, 20, 40])
def test_a_device_that_runs_out_of_memory_for_good(folder, call, refused, monkeypatch, calls):  # noqa: F811
    with monkeypatch.context() as patched:
        patched.setattr(summing, "e_step_of_runs", after(calls, OUT_OF_MEMORY, summing.e_step_of_runs))
        outcome = call(*FIT, *SAVED)
    assert outcome.status == 1
    assert len(outcome.errors) == 1, outcome.stderr
    assert "out of" in outcome.errors[0]
    assert "memory" in outcome.errors[0]
    assert call(*FIT, *SAVED).json["digest"] == call(*FIT).json["digest"]


@pytest.mark.parametrize("calls", [0, 7, 40])
def test_a_device_that_runs_out_of_memory_once(folder, call, monkeypatch, calls):  # noqa: F811
    whole = call(*FIT).json["digest"]
    with monkeypatch.context() as patched:
        once = after(calls, OUT_OF_MEMORY, summing.e_step_of_runs, until=calls + 1)
        patched.setattr(summing, "e_step_of_runs", once)
        outcome = call(*FIT, *SAVED)
    if outcome.status == 0:
        assert outcome.json["digest"] == whole
    else:  # chunks cannot be smaller
        assert len(outcome.errors) == 1
    assert call(*FIT, *SAVED).json["digest"] == whole


DEATHS = {
    "a bug": (RuntimeError("the decoder broke"), "RuntimeError: the decoder broke"),
    "no memory": (MemoryError(), "out of memory"),
    "no more threads": (RuntimeError("can't start new thread"), "can't start new thread"),
    "the system's error": (OSError(5, "Input/output error", "x.npy"), "x.npy: Input/output error"),
}


@pytest.mark.parametrize(("error", "told"), DEATHS.values(), ids=DEATHS.keys())
@pytest.mark.parametrize("later", [0, 20])
def test_a_reader_thread_that_dies(folder, call, monkeypatch, error, told, later):  # noqa: F811
    with monkeypatch.context() as patched:
        reads = []
        patched.setattr(NpySource, "read_into", counting(NpySource.read_into, reads))
        whole = call(*FIT).json["digest"]
    with monkeypatch.context() as patched:
        dying = after(len(reads) // 2 + later, error, NpySource.read_into)
        patched.setattr(NpySource, "read_into", lambda *arguments: dying(*arguments))
        outcome = call(*FIT, *SAVED)
    assert outcome.status == 1
    assert len(outcome.errors) == 1, outcome.stderr
    assert told in outcome.errors[0]
    assert call(*FIT, *SAVED).json["digest"] == whole


def counting(function: Callable, into: list[int]) -> Callable:
    def counted(*arguments: object) -> object:
        into.append(1)
        return function(*arguments)

    return counted
