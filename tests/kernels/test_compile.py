"""The compiler's verdict on the Triton kernels, for GPUs this machine need not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    assert {line["kernel"] for line in lines} == {
        "convert_rows",
        "log_sum_exp",
        "flag_far_rows",
        "accumulate",
        "sum_log_likelihood",
        "add_partials",
    }
    for line in lines:
        assert line["local"] == 0, line
        assert line["registers"] <= 255, line
        assert line["shared"] <= SHARED_LIMITS[architecture], line
        if line["kernel"] in ("log_sum_exp", "accumulate"):
            assert line["hgmma" if architecture == "hopper" else "hmma"] > 0, line
