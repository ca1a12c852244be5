"""Gaussian mixtures on more vectors than memory holds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamgmm._version import __version__
from streamgmm.errors import StreamGMMError

if TYPE_CHECKING:
    from streamgmm.estimator.gaussian_mixture import GaussianMixture
    from streamgmm.estimator.kmeans import KMeans
    from streamgmm.estimator.selection import Selection, select_components
    from streamgmm.io.sources import Source, open_source
    from streamgmm.mixture import Mixture

__all__ = [
    "GaussianMixture",
    "KMeans",
    "Mixture",
    "Selection",
    "Source",
    "StreamGMMError",
    "__version__",
    "open_source",
    "select_components",
]

# Imported when first asked for: no command needs scikit-learn, and ``--version`` not even torch.
_HOMES = {
    "GaussianMixture": "streamgmm.estimator.gaussian_mixture",
    "KMeans": "streamgmm.estimator.kmeans",
    "Mixture": "streamgmm.mixture",
    "Selection": "streamgmm.estimator.selection",
    "Source": "streamgmm.io.sources",
    "open_source": "streamgmm.io.sources",
    "select_components": "streamgmm.estimator.selection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
