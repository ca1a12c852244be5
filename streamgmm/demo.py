"""The demonstration: patches of two photographs, fitted in less memory than they take."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from streamgmm.errors import RequestError
from streamgmm.fitting import fit
from streamgmm.io.sinks import open_sink
from streamgmm.io.sources import open_source
from streamgmm.io.sources.base import Source
from streamgmm.recorder import Progress
from streamgmm.report import convergence, read_run, write_report
from streamgmm.request import FitRequest
from streamgmm.result import FitResult
from streamgmm.run import RunFolder

PATCH = 8
COMPONENTS = 64

_ROWS_AT_ONCE = 65_536


def require_pictures() -> None:
    """Raise RequestError if what reads photographs and draws pictures is not installed."""
    if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("PIL") is None:
        raise RequestError("the demo needs matplotlib and pillow; install streamgmm[plot]")


def cut_patches() -> np.ndarray:
    """Every distinct 8×8 patch of each colour channel of scikit-learn's two photographs, (N, 64) uint8."""
    from sklearn.datasets import load_sample_images

    pieces = []
    for image in load_sample_images().images:
        for channel in np.moveaxis(image, -1, 0):
            windows = np.lib.stride_tricks.sliding_window_view(channel, (PATCH, PATCH))
            pieces.append(windows.reshape(-1, PATCH * PATCH))
    patches = np.concatenate(pieces)
    # Equal patches have equal keys; the random odd factors make unequal ones differ but for one chance in 10⁷.
    factors = np.random.default_rng(0).integers(2**63, size=PATCH * PATCH, dtype=np.uint64) * 2 + 1
    keys = np.zeros(len(patches), dtype=np.uint64)
    for column, factor in enumerate(factors):
        keys += patches[:, column] * factor
    return np.asarray(patches[np.sort(np.unique(keys, return_index=True)[1])])


def prepare_data(output: Path, progress: Progress) -> Path:
    """Write the patches as a sharded Zarr v3 array in ``output``, unless they are there; its path."""
    path = output / "patches.zarr"
    RunFolder(output).close()  # refuses a folder that is something else before anything is written there
    if path.exists():
        return path
    progress.stage("cutting patches")
    patches = cut_patches()
    with open_sink(path, patches.shape, np.dtype(np.float32), overwrite=False) as sink:
        for start in range(0, len(patches), _ROWS_AT_ONCE):
            sink.write(patches[start : start + _ROWS_AT_ONCE].astype(np.float32) / 255)
    return path


def fit_patches(
    data: Path, output: Path, device: str, memory_limit: int | None, progress: Progress
) -> tuple[Source, FitResult]:
    """Fit the patches; resumes as any run does."""
    source = open_source(data)
    request = FitRequest(
        COMPONENTS,
        covariance_type="diag",
        max_iter=30,
        tol=1e-3,
        device=device,
        memory_limit=memory_limit,
        checkpoint_every=10.0,
    )
    return source, fit(source, request, output, progress)


def draw(result: FitResult, output: Path) -> list[Path]:
    """Pictures of what was learnt and of the convergence, in ``output``; their paths."""
    from matplotlib.figure import Figure

    mixture = result.mixture
    order = np.argsort(mixture.weights)[::-1]
    side = int(np.ceil(np.sqrt(len(order))))
    components = Figure(figsize=(7, 7), layout="constrained")
    axes = components.subplots(side, side, gridspec_kw={"wspace": 0.05, "hspace": 0.05}).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, k in zip(axes, order, strict=False):
        axis.imshow(mixture.means[k].reshape(PATCH, PATCH), cmap="gray")
    components.suptitle(f"{len(order)} patches learnt from {result.n_samples:,}, heaviest first")
    paths = [output / "components.png", output / "convergence.png"]
    for figure, path in zip((components, convergence(read_run(output).history)), paths, strict=True):
        figure.savefig(path, dpi=150)
    return paths


def write_page(output: Path) -> Path:
    """The report of the finished run in ``output``; its path."""
    write_report(read_run(output), output / "report.html")
    return output / "report.html"
