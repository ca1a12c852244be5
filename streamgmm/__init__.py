"""Gaussian mixtures on more vectors than memory holds."""

from streamgmm._version import __version__
from streamgmm.errors import StreamGMMError
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
