"""Launch configurations of the Triton kernels: a small table by architecture and shape, never by N or by timing.

What depends on the problem alone (granule, padding) is kept apart from what an architecture may change (tiles). To tune
for another GPU, add rows to `_LAUNCHES` under its name, let `architecture_of` return that name, and compare with
``tools/bench_estep.py``; ``tools/compile_report.py`` shows registers, shared memory and spills without the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from streamgmm.kernels import Problem

COMPONENT_TILE = 64
"""Components of one program of the second launch: what is skipped together where none of them matters to a row."""

COMPONENT_PADDING = 128
ROW_PADDING = 256
LEAST_GRANULE = 1024
_WIDEST_SLICE = 256


@dataclass(frozen=True)
class Tile:
    """What one program holds at once, rows × components, and how it is run."""

    rows: int
    components: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launches:
    """The two launches of an E-step.

    ``step`` features enter one product of the logits. Both launches share it: the second one's logits must have the
    bits of the first one's, or responsibilities do not sum to one (by 1e-5 where steps differed). ``slice`` features
    are accumulated by one program. Where a step holds all features, so does a slice; otherwise ``respond`` stores
    responsibilities first, and ``accumulate`` is the tile of their product with the rows.
    """

    step: int
    slice: int
    log_sum_exp: Tile
    accumulate: Tile
    respond: Tile = Tile(64, COMPONENT_TILE, 4, 2)


@cache
def stride_of(n_features: int) -> int:
    """Features a working row is padded to: a power of two, or whole slices of 256."""
    if n_features <= _WIDEST_SLICE:
        return max(16, 1 << (n_features - 1).bit_length())
    return -(-n_features // _WIDEST_SLICE) * _WIDEST_SLICE


@cache
def granule_of(problem: Problem) -> int:
    """Rows of one fp32 accumulation: enough that a tile finds many live rows, and storing partials stays cheap."""
    width = 16 * problem.n_components
    if problem.covariance_type == "tied":
        width = max(width, 4 * problem.n_features)
    # Many features take long a row: smaller granules then keep all multiprocessors busy.
    most = 16384 if problem.n_features <= _WIDEST_SLICE else 8192
    return min(max(1 << (width - 1).bit_length(), LEAST_GRANULE), most)


def architecture_of(device: torch.device) -> str:
    """``hopper`` where 227 KiB of shared memory and warpgroup products are known; ``any`` is safe in 99 KiB."""
    if device.type != "cuda":
        return "any"
    return "hopper" if torch.cuda.get_device_capability(device) == (9, 0) else "any"


@cache
def gluon_available() -> bool:
    """Whether `hopper` can be imported and does what was tried; decided once, so that a process keeps to one kernel.

    Gluon is experimental: names and meanings change between Triton's minor versions, of which 3.6 was tried. It has no
    interpreter. A run resumed under another version may therefore differ in bits, as it may on another model of GPU.
    """
    try:
        import triton
        import triton.experimental.gluon.nvidia.hopper
    except ImportError:
        return False
    return triton.__version__.startswith("3.6.") and not triton.knobs.runtime.interpret


def overlaps_products(problem: Problem, architecture: str) -> bool:
    """Whether products of ``medium`` may be in flight while exponentials are taken: what `hopper` is written for.

    ``tied`` and ``spherical`` logits, whose features are one product of 128; with 64 it is no faster.
    """
    known = architecture == "hopper" and problem.covariance_type in ("spherical", "tied")
    return known and stride_of(problem.n_features) == 128 and gluon_available()


@cache
def launches_of(problem: Problem, precision: str, architecture: str) -> Launches:
    """Tiles for a problem; ``precision`` is ``medium`` (fp16) or ``high`` (fp16 planes)."""
    stride = stride_of(problem.n_features)
    kind = "diag" if problem.covariance_type == "diag" else "spherical"
    reach = next(limit for limit in _REACHES if limit is None or stride <= limit)
    found = _LAUNCHES[architecture][kind, precision][reach]
    return replace(found, step=min(found.step, stride), slice=min(found.slice, stride))


_REACHES = (64, 128, 256, None)
_Row = dict[int | None, Launches]

# Keyed by the widest stride an entry serves; None is any. A step or a slice narrower than the stride makes the kernels
# loop over features. ``tied`` shares the tiles of ``spherical``.
_LAUNCHES: dict[str, dict[tuple[str, str], _Row]] = {
    "hopper": {
        ("spherical", "medium"): {
            64: Launches(64, 64, Tile(128, 64, 4, 2), Tile(128, 64, 4, 2)),
            128: Launches(128, 128, Tile(256, 64, 8, 3), Tile(128, 64, 4, 3)),
            256: Launches(256, 256, Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            None: Launches(64, 128, Tile(128, 128, 8, 4), Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)),
        },
        ("diag", "medium"): {
            64: Launches(64, 64, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            128: Launches(128, 128, Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
            256: Launches(64, 128, Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 4, 3)),
            None: Launches(64, 128, Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 4, 3)),
        },
        ("spherical", "high"): {
            64: Launches(64, 64, Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
            128: Launches(64, 128, Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)),
            256: Launches(32, 128, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
            None: Launches(64, 128, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        },
        ("diag", "high"): {
            64: Launches(32, 64, Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)),
            128: Launches(32, 64, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
            256: Launches(32, 64, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
            None: Launches(32, 64, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        },
    },
    "any": {
        ("spherical", "medium"): dict.fromkeys(_REACHES, Launches(64, 64, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))),
        ("diag", "medium"): dict.fromkeys(_REACHES, Launches(32, 32, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2))),
        ("spherical", "high"): dict.fromkeys(_REACHES, Launches(32, 64, Tile(64, 64, 4, 2), Tile(32, 64, 8, 2))),
        ("diag", "high"): dict.fromkeys(
            _REACHES, Launches(32, 32, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 64, 4, 2))
        ),
    },
}
