"""Where the Triton kernels run: on a CUDA device, or else in Triton's interpreter on the CPU."""

from __future__ import annotations

import inspect
import os
import sys
from functools import cache
from typing import Any

import pytest
import torch

# The interpreter is chosen when Triton is imported, so this comes before any test module does.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton was imported before its interpreter could be chosen"
    return torch.device("cpu")


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """Triton's interpreter looks through all of its language at every call within a kernel, for what it has replaced
    there already: a third of the time. The names of what is built in stay the same, so one look is enough."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that whatever a kernel forgets to write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs)))
