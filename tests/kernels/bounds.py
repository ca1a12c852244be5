"""Bounds of every load and store while Triton's interpreter runs: what a sanitizer checks on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A kernel touched memory of none of its arguments."""


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise `OutOfBounds`, wrapped by the interpreter, where a kernel leaves the memory of its tensors."""
    within: list[tuple[int, int]] = []

    def check(pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle | None) -> None:
        places = np.asarray(pointers.data).ravel().astype(np.int64)
        if mask is not None:
            places = places[np.asarray(mask.data).ravel().astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(places.shape, dtype=bool)
        for begin, end in within:
            inside |= (begin <= places) & (places + size <= end)
        if not inside.all():
            raise OutOfBounds(f"{np.count_nonzero(~inside)} of {places.size} places belong to no argument")

    def checked(name: str) -> None:
        original = getattr(interpreter.InterpreterBuilder, name)
        # The mask comes last among the pointers and values: after the pointers of a load, after the value of a store.
        place = 1 if name.endswith("load") else 2

        def method(self, pointers, *others, **named):
            check(pointers, others[place - 1])
            return original(self, pointers, *others, **named)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, method)

    checked("create_masked_load")
    checked("create_masked_store")
    launch = interpreter.GridExecutor.__call__

    def launched(self, *arguments, **named):
        storages = [a.untyped_storage() for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
        within[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return launch(self, *arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
