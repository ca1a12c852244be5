"""The compiler's verdict on the Triton kernels, for GPUs this machine need not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Tiles that spill some bytes and were still the fastest measured (docs/log.md), and one that predictions alone use.
SPILLS_THAT_PAY = {
    ("accumulate", "diag", 128, "hopper"): 72,
    ("accumulate", "spherical", 128, "hopper"): 56,
    ("best_component", "diag", 64, "any"): 8,
}
TENSOR_CORES = (
    "log_sum_exp", "best_component", "respond", "accumulate", "whiten_rows", "second_moment",
    "split_log_sum_exp", "split_best_component", "split_forms", "split_accumulate",
)  # fmt: skip
SHARED_LIMITS = {"hopper": 227 << 10, "any": 99 << 10}


@pytest.mark.parametrize(("architecture", "features"), [("hopper", ["128", "768"]), ("any", ["64", "768"])])
def test_no_spills_and_tensor_cores(architecture, features):
    # A process of its own: here Triton may have been imported as an interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "tools/compile_report.py", "--json", "--architecture", architecture, "--features"]
    done = subprocess.run([*command, *features], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {line["kernel"] for line in lines}
    assert {"convert_rows", "whiten_rows", "log_sum_exp", "best_component", "list_live_rows", "accumulate"} < kernels
    assert {"split_rows", "split_log_sum_exp", "split_best_component", "split_accumulate", "add_partials"} < kernels
    for line in lines:
        shape = line["kernel"], line["covariance_type"], line["n_features"], architecture
        assert line["local"] <= SPILLS_THAT_PAY.get(shape, 0), line
        assert line["registers"] <= 255, line
        assert line["shared"] <= SHARED_LIMITS[architecture], line
        if line["kernel"] in TENSOR_CORES:
            assert line["hgmma" if architecture == "hopper" else "hmma"] > 0, line
