"""Which lists a query looks into: their order, and where to stop.

Ranked by distance and stopped after a fixed number, as every IVF index does, unless asked otherwise. `calibration`
finds the stopping value that reaches a recall.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamgmm.ann.hits import HitModel
from streamgmm.ann.quantizer import Quantizer, tempered
from streamgmm.device import compute_workers
from streamgmm.errors import RequestError
from streamgmm.inference import frame_of_mixture
from streamgmm.io.bfloat16 import as_rows
from streamgmm.kernels.tiled import TiledKernel

RANKINGS = ("distance", "posterior")
STOPS = ("count", "margin", "mass", "odds")
"""``odds`` is the one that a target recall is best met with; see docs/ann.md."""


@dataclass(frozen=True)
class Probing:
    """Attributes
    ----------
    ranking : {'distance', 'posterior'}
        Nearest centroid first, or most responsible component first.
    stop : {'count', 'margin', 'mass', 'odds'}
        After ``value`` lists; before the first list whose ‖q − c‖² exceeds the nearest's by more than ``value``; when
        the lists' responsibilities add up to ``value``; or before the first list against whose holding a neighbour the
        log odds of ``hits`` exceed ``value``.
    value : float
    temperature : float
        Of the responsibilities: r^(1/T).
    most : int
        Lists a query looks into at most.
    hits : HitModel, optional
        What ``odds`` needs.
    """

    ranking: str = "distance"
    stop: str = "count"
    value: float = 1.0
    temperature: float = 1.0
    most: int = 1024
    hits: HitModel | None = None

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise RequestError(f"ranking must be one of {', '.join(RANKINGS)}; got {self.ranking!r}")
        if self.stop not in STOPS:
            raise RequestError(f"stop must be one of {', '.join(STOPS)}; got {self.stop!r}")
        least = {"count": 1.0, "odds": -float("inf")}.get(self.stop, 0.0)
        if not self.value >= least:
            raise RequestError(f"value must be at least {least} for stop {self.stop!r}; got {self.value}")
        if (self.stop == "odds") != (self.hits is not None):
            raise RequestError("hits (a HitModel) and stop 'odds' belong together; give both or neither")
        if self.most < 1:
            raise RequestError(f"most must be at least 1; got {self.most}")

    @property
    def is_plain(self) -> bool:
        """Whether it is what every IVF index does: the nearest lists, so many."""
        return self.ranking == "distance" and self.stop == "count"

    def at(self, value: float) -> Probing:
        """The same rule with another stopping value."""
        return replace(self, value=value)


@dataclass(frozen=True, eq=False)
class Ranked:
    """Lists in the order in which queries look into them.

    Attributes
    ----------
    lists : (Q, P) int64 tensor
    distances : (Q, P) fp32 tensor
        ‖q − c‖² of each.
    keys : (Q, P) fp64 tensor
        Never falling along a row: a query looks into the lists whose key is at most `Probing.value`.
    """

    lists: Tensor
    distances: Tensor
    keys: Tensor

    def kept(self, value: float) -> Tensor:
        """Lists that each query looks into, (Q,); one at least."""
        return (self.keys <= value).sum(1).clamp(min=1)


def rank_lists(queries: Tensor, quantizer: Quantizer, probing: Probing) -> Ranked:
    """The first `Probing.most` lists of each of ``queries`` (Q, D), whatever the stopping value."""
    most = min(probing.most, quantizer.n_lists)
    x = queries.double()
    centroids = torch.as_tensor(quantizer.centroids, device=x.device).double()
    shift = centroids.mean(0)
    distances = torch.cdist(x - shift, centroids - shift).square().float()
    joint = None
    if probing.ranking == "posterior" or probing.stop == "mass":
        joint = _log_joint(queries, quantizer, probing.temperature)
    # Stable: ties go to the lower list.
    score = distances if probing.ranking == "distance" or joint is None else -joint
    lists = score.argsort(dim=1, stable=True)[:, :most]
    distances = distances.gather(1, lists)
    if probing.stop != "mass":
        return with_keys(lists, distances, probing)
    assert joint is not None
    resp = torch.softmax(joint, dim=1).gather(1, lists)
    # What was seen before a list is looked into: when it suffices, the list is not.
    before = torch.cat([torch.zeros_like(resp[:, :1]), resp.cumsum(1)[:, :-1]], 1)
    return Ranked(lists, distances, before)


def with_keys(lists: Tensor, distances: Tensor, probing: Probing) -> Ranked:
    """Lists and ‖q − c‖² in their order, (Q, P) each, with the keys of any rule but ``mass``."""
    if probing.hits is not None:
        keys = -probing.hits.log_odds(lists, distances).double()
    elif probing.stop == "margin":
        keys = (distances - distances[:, :1]).double()
    else:
        keys = torch.arange(1, lists.shape[1] + 1, device=lists.device).double().expand(lists.shape)
    return Ranked(lists, distances, keys.cummax(1).values)


def _log_joint(queries: Tensor, quantizer: Quantizer, temperature: float) -> Tensor:
    """log w_k p_k(q) / T but for a constant a query, (Q, K) fp64, on the queries' device."""
    if not quantizer.has_responsibilities:
        raise RequestError("centroids alone have no responsibilities; rank by distance and stop by count or margin")
    mixture = tempered(quantizer.mixture, temperature)
    frame = frame_of_mixture(mixture, as_rows(queries[:1].cpu()).dtype)
    kernel = TiledKernel(torch.float64, compute_workers(queries.device))
    parameters = kernel.parameters(mixture, frame, queries.device)
    return torch.cat(list(kernel.map_joint(lambda joint: joint.T.clone(), queries, parameters)))
