"""Launches as the host code would make them, recorded instead of made: what is compiled is what would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction, mangle_type, type_canonicalisation_dict

Items = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that its compilation depends on.

    Attributes
    ----------
    module, kernel : str
        Where the kernel is found.
    signature, constants : pairs of a parameter's name and its type, or its value where it is known when compiled
    aligned : names of parameters that are multiples of 16
    options : pairs of an option's name and its value: warps and stages
    """

    module: str
    kernel: str
    signature: Items
    constants: Items
    aligned: tuple[str, ...]
    options: Items


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches made within, in order and once each; nothing runs, and tensors keep whatever they hold."""
    launches: dict[Launch, None] = {}
    found: list[Launch] = []

    def record(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = _launch(function, arguments, named)
        if launch not in launches:
            launches[launch] = None
            found.append(launch)

    with patch.object(JITFunction, "run", record):
        yield found


def _launch(function: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    values = dict(zip(function.arg_names, arguments, strict=False)) | {
        name: value for name, value in named.items() if name in function.arg_names
    }
    signature, constants, aligned = [], [], []
    for parameter in function.params:
        value = values[parameter.name]
        # Triton compiles a one in, and knows of multiples of 16, unless told not to.
        special = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        signature.append((parameter.name, _type_of(value)))
        if (isinstance(value, torch.Tensor) and value.data_ptr() % 16 == 0) or (special and value % 16 == 0):
            aligned.append(parameter.name)
    options = tuple(sorted((name, value) for name, value in named.items() if name not in function.arg_names))
    return Launch(
        function.fn.__module__, function.__name__, tuple(signature), tuple(constants), tuple(aligned), options
    )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, TensorDescriptor):
        return str(mangle_type(value))
    return "i32" if -(2**31) <= value < 2**31 else "i64"
