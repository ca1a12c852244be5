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
from streamgmm.kernels.fused import joint, rows, split, split_sums, sums
from streamgmm.kernels.fused.configs import COMPONENT_TILE, granule_of, launches_of, stride_of
from streamgmm.kernels.fused.split_parameters import slice_of

CAPABILITIES = {"hopper": 90, "any": 86}
FEATURES = (13, 64, 128, 256, 768)
STORED = {"fp64": "fp64", "fp32": "fp32", "fp16": "fp16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8"}
_FP32 = (
    "norms", "exponents", "constants", "lse", "maxima", "before", "best", "weights", "units", "scaled", "partials",
    "counts", "sums", "scatter", "moments", "energies", "factors", "weight_units", "forms",
)  # fmt: skip
_FP16 = ("x", "linear", "resp", "factor", "factor_low", "centres")
_FP64 = ("total", "out", "total_counts", "total_sums", "total_scatter")
_INT32 = ("flags", "labels", "lists", "n_live", "order", "label", "label_before")
_NUMBERS = ("threshold", "row_unit", "square_unit", "product_unit", "limit")
_TILED = {
    "log_sum_exp": "log_sum_exp", "best_component": "log_sum_exp", "respond": "respond", "accumulate": "accumulate",
    "split_log_sum_exp": "log_sum_exp", "split_best_component": "log_sum_exp", "split_forms": "respond",
    "split_accumulate": "accumulate",
}  # fmt: skip
_PLAIN = ("flag_far_rows", "list_live_rows", "scale_weights", "sum_rows", "add_partials", "add_in_order")
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
        Variant(kernel, covariance_type, "medium", d, architecture)
        for d in features
        for covariance_type in ("spherical", "diag", "tied")
        for kernel in ("log_sum_exp", "best_component", "respond", "accumulate")
        if kernel != "respond" or _stores(covariance_type, "medium", d, architecture)
    ]
    found += [
        Variant(kernel, covariance_type, "high", d, architecture)
        for d in features
        for covariance_type in ("spherical", "diag")
        for kernel in ("split_log_sum_exp", "split_best_component", "split_forms", "split_accumulate")
        if kernel != "split_forms" or _stores(covariance_type, "high", d, architecture)
    ]
    found += [
        Variant(kernel, "tied", "medium", d, architecture)
        for d in features
        for kernel in ("whiten_rows", "second_moment")
    ]
    found += [
        Variant(kernel, "spherical", precision, 128, architecture, stored)
        for kernel, precision in (("convert_rows", "medium"), ("split_rows", "high"))
        for stored in STORED
    ]
    return [*found, *(Variant(name, "", "", 128, architecture) for name in _PLAIN)]


def _stores(covariance_type: str, precision: str, d: int, architecture: str) -> bool:
    """Whether responsibilities, or what they follow from, are computed once and stored."""
    launches, stride = launches_of(Problem(1024, d, covariance_type), precision, architecture), stride_of(d)
    return (launches.slice if precision == "high" else launches.step) < stride


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
    module = next(module for module in (rows, joint, sums, split, split_sums) if hasattr(module, variant.kernel))
    function = getattr(module, variant.kernel)
    problem = Problem(1024, variant.n_features, variant.covariance_type)
    stride = stride_of(problem.n_features)
    diag, high = variant.covariance_type == "diag", variant.precision == "high"
    stored = variant.stored or "fp32"
    types = dict.fromkeys(_FP32, "*fp32") | dict.fromkeys(_FP16, "*fp16") | dict.fromkeys(_INT32, "*i32")
    types |= dict.fromkeys(_FP64, "*fp64") | dict.fromkeys(_NUMBERS, "fp32")
    types |= {"rows": f"*{stored}", "quadratic": "*fp16" if diag or high else "*fp32"}
    types |= dict.fromkeys(("shift", "scale"), "*fp64" if stored == "fp64" or high else "*fp32")
    constants: dict[str, object] = {"GRANULE": granule_of(problem), "STRIDE": stride, "SLICE": slice_of(stride)}
    constants |= {"DIAG": diag, "NORM": variant.covariance_type == "spherical", "SCALED": False, "HARD": False}
    constants |= {"WEIGHTED": False, "TILE": COMPONENT_TILE, "MAXIMA": True, "FIRST": False, "COMMON": False}
    constants |= {"LIMIT": 255.0, "D": problem.n_features, "FAR": 2**17, "DENSE_ABOVE": 0.6, "GIVEN": False}
    options: dict[str, int] = {}
    if variant.kernel in _TILED:
        launches = launches_of(problem, variant.precision, variant.architecture)
        tile = getattr(launches, _TILED[variant.kernel])
        constants |= {"STEP": launches.step, "OWN": launches.slice}
        constants |= {
            "GIVEN": _stores(problem.covariance_type, variant.precision, problem.n_features, variant.architecture)
        }
        constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COMPONENTS": tile.components}
        if not high:
            constants["SLICE"] = launches.slice
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
    elif variant.kernel == "convert_rows":
        constants |= {"BLOCK_ROWS": 32, "BLOCK_FEATURES": min(stride, 128)}
    elif variant.kernel == "split_rows":
        constants |= {"BLOCK_ROWS": 16, "BLOCK_FEATURES": slice_of(stride)}
    elif variant.kernel == "whiten_rows":
        constants |= {"BLOCK_ROWS": 64, "BLOCK_OUT": min(stride, 128), "STEP": min(stride, 32)}
        options = {"num_warps": 4, "num_stages": 2}
    elif variant.kernel == "second_moment":
        block = min(stride, 128)
        constants |= {"BLOCK_ROWS": 64, "BLOCK_FEATURES": block}
        options = {"num_warps": 8 if block == 128 else 4, "num_stages": 3}
    else:
        constants |= {"BLOCK_ROWS": 1024, "BLOCK": 128}
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
