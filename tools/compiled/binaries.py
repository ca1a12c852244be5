"""A launch's binary, and what it holds."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .launches import Launch

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Binary:
    """Registers a thread, bytes of shared and of local memory (stack and spills), and counted instructions."""

    registers: int
    shared: int
    local: int
    hgmma: int
    hmma: int


def compiled(launch: Launch, capability: int) -> Binary:
    """Compile for a compute capability (90 is 9.0) and disassemble."""
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    names = function.arg_names
    source = (GluonASTSource if function.is_gluon() else ASTSource)(
        function,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        sass = _dump("-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Binary(
        registers=found["REG"],
        shared=binary.metadata.shared,
        local=found["STACK"] + found["LOCAL"],
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        hmma=len(re.findall(r"\bHMMA\b", sass)),
    )


def _dump(option: str, path: str) -> str:
    return subprocess.run([_CUOBJDUMP, option, path], check=True, capture_output=True, text=True).stdout
