"""Gaussian mixtures on more vectors than memory holds."""

from streamgmm._version import __version__
from streamgmm.errors import StreamGMMError
from streamgmm.estimator.gaussian_mixture import GaussianMixture
from streamgmm.io.sources import Source, open_source
from streamgmm.mixture import Mixture

__all__ = ["GaussianMixture", "Mixture", "Source", "StreamGMMError", "__version__", "open_source"]
