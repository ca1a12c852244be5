from __future__ import annotations

import subprocess
import sys

import streamgmm


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
    assert all(hasattr(streamgmm, name) for name in streamgmm.__all__)


def test_importing_does_not_import_what_is_rare_or_slow():
    code = (
        "import sys, streamgmm; print([m for m in ('triton', 'dask.array', 'matplotlib', 'h5py') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
