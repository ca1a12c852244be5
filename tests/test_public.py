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


COMMANDS = ", ".join(f"streamgmm.cli.{name}" for name in NAMES)
RARE = ("triton", "dask", "distributed", "matplotlib", "h5py")


def test_importing_does_not_import_what_is_rare_or_slow():
    """One process, which imports more and more."""
    steps = (
        ("streamgmm, streamgmm.cli", ("torch", "numpy")),
        (COMMANDS, (*RARE, "sklearn", "scipy", "pandas", "zarr")),
        ("streamgmm.estimator.kmeans, streamgmm.estimator.gaussian_mixture", RARE),
    )
    code = "import sys\n" + "\n".join(
        f"import {modules}\nprint([name for name in {names} if name in sys.modules])" for modules, names in steps
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"] * 3
