"""What the compiler makes of every Triton kernel, without a GPU: registers, shared memory, spills, tensor-core work.

    python tools/compile_report.py [--architecture hopper|any] [--features 128 ...] [--json] [--only NAME]

It must run without TRITON_INTERPRET. ``any`` is compiled for compute capability 8.6, whose blocks have 99 KiB.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamgmm.kernels import Problem
from streamgmm.kernels import triton_kernels as device_code
from streamgmm.kernels.triton_configs import granule_of, launches_of, stride_of

CAPABILITIES = {"hopper": 90, "any": 86}
FEATURES = (13, 64, 128, 256, 768)
STORED = {"fp64": "fp64", "fp32": "fp32", "fp16": "fp16", "i8": "int8", "u8": "uint8"}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Variant:
    """One kernel as it would be launched."""

    kernel: str
    covariance_type: str
    precision: str
    n_features: int
    architecture: str
    stored: str = ""


@dataclass(frozen=True)
class Compiled:
    """What came out: bytes of shared memory and of local memory (stack and spills), counted instructions."""

    registers: int
    shared: int
    local: int
    hgmma: int
    hmma: int


def variants(architecture: str, features: tuple[int, ...]) -> list[Variant]:
    """Every kernel × type × precision × shape class; conversion from every stored type at one shape."""
    found = [
        Variant(kernel, covariance_type, precision, d, architecture)
        for d in features
        for precision in ("medium", "high")
        for covariance_type in ("spherical", "diag")
        for kernel in ("log_sum_exp", "accumulate")
    ]
    found += [
        Variant("convert_rows", "spherical", precision, 128, architecture, stored)
        for precision in ("medium", "high")
        for stored in STORED
    ]
    return [
        *found,
        *(Variant(name, "", "", 128, architecture) for name in ("flag_far_rows", "sum_log_likelihood", "add_partials")),
    ]


def compiled(variant: Variant) -> Compiled:
    """Compile and disassemble."""
    source, options = _source(variant)
    target = GPUTarget("cuda", CAPABILITIES[variant.architecture], 32)
    binary = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        sass = _dump("-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        registers=found["REG"],
        shared=binary.metadata.shared,
        local=found["STACK"] + found["LOCAL"],
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        hmma=len(re.findall(r"\bHMMA\b", sass)),
    )


def _dump(option: str, path: str) -> str:
    return subprocess.run([_CUOBJDUMP, option, path], check=True, capture_output=True, text=True).stdout


def _source(variant: Variant) -> tuple[ASTSource, dict[str, int]]:
    function = getattr(device_code, variant.kernel)
    problem = Problem(1024, variant.n_features, variant.covariance_type)
    stride, granule = stride_of(problem.n_features), granule_of(problem)
    diag = variant.covariance_type == "diag"
    working = "*fp16" if variant.precision == "medium" else "*fp32"
    types = dict.fromkeys(("norms", "exponents", "constants", "lse", "counts", "sums", "scatter"), "*fp32")
    types |= {"x": working, "linear": working, "quadratic": working if diag else "*fp32", "flags": "*i32"}
    types |= {"total": "*fp64", "partials": "*fp32", "out": "*fp64", "rows": f"*{variant.stored}"}
    types |= dict.fromkeys(("shift", "scale"), "*fp64" if variant.stored == "fp64" else "*fp32")
    product = "ieee" if variant.precision == "medium" else "tf32x3"
    constants: dict[str, object] = {"GRANULE": granule, "STRIDE": stride, "DIAG": diag, "PRECISION": product}
    options: dict[str, int] = {}
    if variant.kernel in ("log_sum_exp", "accumulate"):
        launches = launches_of(problem, variant.precision, variant.architecture)
        tile = getattr(launches, variant.kernel)
        constants |= {"STEP": launches.step, "SLICE": launches.slice}
        constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COMPONENTS": tile.components}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
    elif variant.kernel == "convert_rows":
        limit = 255.0 if variant.precision == "medium" else 0.0
        constants |= {"D": problem.n_features, "LIMIT": limit, "BLOCK_ROWS": 32, "BLOCK_FEATURES": min(stride, 128)}
    else:
        constants |= {"BLOCK_ROWS": 1024, "BLOCK": 256, "FAR": 2**17}
    names = function.arg_names
    own = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in own else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    return ASTSource(
        function, signature, {(names.index(name),): value for name, value in own.items()}, aligned
    ), options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=tuple(CAPABILITIES), default="hopper")
    parser.add_argument("--features", type=int, nargs="+", default=list(FEATURES))
    parser.add_argument("--only", help="a kernel's name")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    arguments = parser.parse_args()
    chosen = [
        variant
        for variant in variants(arguments.architecture, tuple(arguments.features))
        if arguments.only in (None, variant.kernel)
    ]
    if not arguments.json:
        print(f"{'kernel':<20}{'type':<11}{'precision':<10}{'D':>5} {'stored':<7}", end="")
        print("".join(f"{name:>10}" for name in Compiled.__annotations__))
    with ProcessPoolExecutor(2) as pool:
        for variant, result in zip(chosen, pool.map(compiled, chosen), strict=True):
            if arguments.json:
                print(json.dumps(asdict(variant) | asdict(result)), flush=True)
                continue
            v = variant
            print(f"{v.kernel:<20}{v.covariance_type:<11}{v.precision:<10}{v.n_features:>5} {v.stored:<7}", end="")
            print("".join(f"{value:>10}" for value in asdict(result).values()), flush=True)


if __name__ == "__main__":
    main()
