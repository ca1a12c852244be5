from __future__ import annotations

import subprocess
import sys

import pytest

import streamgmm
from streamgmm.cli.commands import NAMES


def test_exported_names():
    assert streamgmm.__all__ == sorted(streamgmm.__all__)
    assert set(streamgmm.__all__) == {
        "GaussianMixture",
        "KMeans",
        "Mixture",
        "Selection",
        "Source",
        "StreamGMMError",
        "__version__",
        "open_source",
        "select_components",
    }
    things = set(streamgmm.__all__) - {"__version__"}
    assert all(getattr(streamgmm, name).__module__.startswith("streamgmm.") for name in things)
    assert set(streamgmm.__all__) <= set(dir(streamgmm))
    with pytest.raises(AttributeError, match="module 'streamgmm' has no attribute 'nothing'"):
        streamgmm.nothing  # noqa: B018


def test_importing_does_not_import_what_is_rare_or_slow():
    rare = ("triton", "dask", "distributed", "matplotlib", "h5py")
    assert not imported("streamgmm, streamgmm.estimator.kmeans, streamgmm.cli.fit", *rare)


def test_a_command_imports_what_it_needs_alone():
    assert not imported("streamgmm, streamgmm.cli", "torch", "numpy")
    commands = ", ".join(f"streamgmm.cli.{name}" for name in NAMES)
    assert not imported(commands, "sklearn", "scipy", "pandas", "zarr", "dask", "triton")


def imported(modules: str, *names: str) -> list[str]:
    """Those of ``names`` that a process has imported with ``modules``."""
    code = f"import sys, {modules}; print(*(name for name in {names} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
