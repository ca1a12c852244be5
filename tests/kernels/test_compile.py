"""The compiler's verdict on the Triton kernels, for GPUs this machine need not have."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Bytes on the stack by kernel, type, features and whether assignment is hard. The soft tiles were the fastest measured,
# spills and all (docs/log.md); hard assignment shares them, and visits a row for one tile only.
SPILLS = {
    ("accumulate", "spherical", 128, False): 64,
    ("accumulate", "spherical", 256, False): 56,
    ("accumulate", "diag", 128, False): 176,
    ("accumulate", "tied", 256, False): 16,
    ("accumulate", "spherical", 64, True): 32,
    ("accumulate", "spherical", 128, True): 208,
    ("accumulate", "spherical", 256, True): 144,
    ("accumulate", "spherical", 768, True): 8,
    ("accumulate", "tied", 128, True): 16,
    ("accumulate", "tied", 256, True): 8,
}
# On tiles of other GPUs, which were never tuned, a few bytes.
OTHER_SPILLS = 48
OVERLAPPED = "overlapped_log_sum_exp"
TENSOR_CORES = {
    "joint": {"log_sum_exp", "best_component"},
    "hopper": {OVERLAPPED},
    "stored": {"respond", "accumulate_stored"},
    "sums": {"accumulate", "second_moment"},
    "rows": {"whiten_rows"},
    "split": {"split_log_sum_exp", "split_best_component"},
    "split_sums": {"split_forms", "split_accumulate"},
    "full": {"log_joint", "complete", "accumulate"},
    "scoring": {"group_winners"},
}
WARP_GROUP_ROWS = 64
FEATURES_DOWN = {("sums", "second_moment"), ("full", "accumulate")}
SHARED_LIMITS = {"hopper": 227 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10}


def report(target: str, *options: str) -> list[dict[str, Any]]:
    # A process of its own: here Triton may have been imported as an interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "tools/compile_report.py", "--json", "--target", target, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(line: dict[str, Any], target: str) -> None:
    shape = line["kernel"], line["covariance_type"], line["n_features"], line["call"].startswith("hard")
    assert line["local"] <= (SPILLS.get(shape, 0) if target == "hopper" else OTHER_SPILLS), line
    assert line["registers"] <= 255, line
    assert line["shared"] <= SHARED_LIMITS[target], line
    if line["kernel"] in TENSOR_CORES.get(line["module"], set()):
        # Where features are the rows of a product, and fewer than a warp group's 64, it is one for single warps.
        narrow = (line["module"], line["kernel"]) in FEATURES_DOWN and line["n_features"] < WARP_GROUP_ROWS
        assert line["hgmma" if target == "hopper" and not narrow else "hmma"] > 0, line


def launched(target: str) -> set[tuple[str, str]]:
    """Module and name of every kernel that some line of the host code launches, ``kernel[grid](…)``, on a target."""
    folder = ROOT / "streamgmm/kernels"
    trees = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*/*.py") if path.stem != "__init__"}
    jitted: dict[str, set[str]] = {}
    for stem, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any(".jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.setdefault(node.name, set()).add(stem)
    found = set()
    for stem, tree in trees.items():
        modules = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            kernel = node.func.value
            name = kernel.attr if isinstance(kernel, ast.Attribute) else ast.unparse(kernel)
            if name in jitted:
                home = jitted[name]
                own = modules.get(ast.unparse(kernel.value)) if isinstance(kernel, ast.Attribute) else None
                assert own in home or len(home) == 1, f"{stem}: which {name}?"
                found.add((own if own in home else next(iter(home)), name))
    return {(module, name) for module, name in found if module != "hopper" or target == "hopper"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("target", "features"), [("hopper", ["128", "768"]), ("sm_86", ["64", "128"])])
def test_no_spills_and_tensor_cores(target, features):
    lines = report(target, "--features", *features)
    assert {(line["module"], line["kernel"]) for line in lines} >= launched(target) - {("rows", "scale_weights")}
    for line in lines:
        check(line, target)


@pytest.mark.timeout(900)
def test_two_programs_of_overlapped_products_share_a_multiprocessor():
    # The first of the features has likelihoods alone too, which want no maxima.
    lines = report("hopper", "--features", "128", "--only", OVERLAPPED)
    assert {line["constants"]["MAXIMA"] for line in lines} == {True, False}
    for line in lines:
        check(line, "hopper")
        assert line["shared"] <= SHARED_LIMITS["hopper"] // 2, line


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_every_launch(target):
    lines = report(target, "--every")
    assert {(line["module"], line["kernel"]) for line in lines} == launched(target)
    for line in lines:
        check(line, target)
