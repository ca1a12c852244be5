"""Which lists a vector is stored in, from its nearest centroids alone.

With r = x − c of the nearest centroid c and r' = x − c' of another, a second list is the c' that minimises

* ``top2``: ‖r'‖²;
* ``soar``: ‖r'‖² + λ (r̂·r')², residuals orthogonal to the first (Sun et al. 2023, SOAR);
* ``air``: ‖r'‖² + λ r·r', residuals on the other side of it; c itself is a candidate, with (1 + λ)‖r‖², and a vector
  for which c remains the best has one list only: the gate.

``top1`` stores each vector once. ``resp``, Flash-GMM's, stores it wherever its responsibility exceeds τ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamgmm.errors import RequestError

POLICIES = ("top1", "resp", "top2", "soar", "air")
"""Every policy by name."""

DEFAULT_POLICY = "air"
"""What docs/ann.md measures to need the fewest distance computations at a given recall and index size."""

DEFAULT_STRENGTH = {"soar": 1.0, "air": 0.5}
"""λ where none is given."""

NO_LIST = -1

_MOST_COPIES = 64


@dataclass(frozen=True)
class Policy:
    """Attributes
    ----------
    name : {'top1', 'resp', 'top2', 'soar', 'air'}
    strength : float, optional
        λ of ``soar`` and ``air``.
    threshold : float, optional
        τ of ``resp``; None is 1/K. Of ``top2``, ``soar`` and ``air`` the gate, g: a second list is used where its loss
        is below (1 + g) ‖r‖²; None: λ for ``air``, and no gate for the others.
    max_copies : int
        Lists a vector is stored in at most. Above 2 only with ``resp``.
    candidates : int
        Nearest centroids among which the second list is sought.
    """

    name: str = DEFAULT_POLICY
    strength: float | None = None
    threshold: float | None = None
    max_copies: int = 2
    candidates: int = 16

    def __post_init__(self) -> None:
        name = self.name
        if name not in POLICIES:
            raise RequestError(f"policy must be one of {', '.join(POLICIES)}; got {name!r}")
        if self.strength is not None and name not in DEFAULT_STRENGTH:
            raise RequestError(f"strength (λ) belongs to soar and air, and the policy is {name!r}; leave it out")
        if self.strength is not None and not 0 <= self.strength < float("inf"):
            raise RequestError(f"strength (λ) must be at least 0 and finite; got {self.strength}")
        if self.threshold is not None and name == "top1":
            raise RequestError("threshold (τ) belongs to the other policies, and this one is 'top1'; leave it out")
        least, most = (0, _MOST_COPIES) if name == "resp" else (-1, 2)
        if self.threshold is not None and not self.threshold >= least:
            raise RequestError(f"threshold (τ) must be at least {least} for policy {name!r}; got {self.threshold}")
        if not 1 <= self.max_copies <= most:
            raise RequestError(f"max_copies must be between 1 and {most} for policy {name!r}; got {self.max_copies}")
        if self.candidates < 2:
            raise RequestError(f"candidates must be at least 2; got {self.candidates}")

    @property
    def width(self) -> int:
        """Columns of the table of lists: the copies of a vector at most."""
        return 1 if self.name == "top1" else self.max_copies

    @property
    def lam(self) -> float:
        """λ in use."""
        return DEFAULT_STRENGTH.get(self.name, 0.0) if self.strength is None else self.strength

    @property
    def gate(self) -> float:
        """g in use; infinity where every vector has a second list."""
        if self.threshold is not None:
            return self.threshold
        return self.lam if self.name == "air" else float("inf")

    def with_threshold(self, threshold: float) -> Policy:
        return replace(self, threshold=threshold)

    def columns(self, n_lists: int) -> int:
        """`width` with no more than ``n_lists`` lists."""
        return min(self.width, n_lists)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The nearest centroids of some rows, nearest first; ties go to the lower index.

    Attributes
    ----------
    lists : (n, m) int64 tensor
    distances : (n, m) fp32 tensor
        ‖x − c‖².
    inner : (n, m) fp32 tensor
        r·r' with the residual of the nearest centroid.
    """

    lists: Tensor
    distances: Tensor
    inner: Tensor


def second_lists(candidates: Candidates, policy: Policy) -> tuple[Tensor, Tensor]:
    """The best second list of each row (n,), and how good it is (n,): its loss over ‖r‖², less 1.

    The smaller, the better; `Policy.gate` is compared with it. There must be two candidates.
    """
    first = candidates.distances[:, :1]
    loss = candidates.distances[:, 1:]
    inner = candidates.inner[:, 1:]
    if policy.name == "soar":
        # ‖r‖ = 0: r̂ has no direction, and there is nothing to be orthogonal to.
        loss = loss + policy.lam * inner**2 / first.clamp(min=torch.finfo(first.dtype).tiny)
    elif policy.name == "air":
        loss = loss + policy.lam * inner
    best, position = loss.min(1)
    # A vector on its centroid is found with it: nothing is better.
    gain = torch.where(first[:, 0] > 0, best / first[:, 0] - 1, torch.inf)
    return candidates.lists.gather(1, position[:, None] + 1)[:, 0], gain


def lists_of(candidates: Candidates, policy: Policy) -> Tensor:
    """The lists of each row, (n, columns) int32, nearest first, `NO_LIST` behind the last."""
    nearest = candidates.lists[:, :1]
    if policy.width == 1 or candidates.lists.shape[1] == 1:
        return nearest.int()
    second, gain = second_lists(candidates, policy)
    kept = gain < policy.gate if policy.gate < float("inf") else torch.ones_like(gain, dtype=torch.bool)
    return torch.stack([nearest[:, 0], torch.where(kept, second, NO_LIST)], 1).int()


def lists_above(labels: Tensor, resp: Tensor, threshold: float) -> Tensor:
    """The policy ``resp``: the most responsible list, and others with more than ``threshold``; (n, m) int32.

    ``labels`` and ``resp`` (n, m) are best first.
    """
    kept = resp > threshold
    kept[:, 0] = True
    return torch.where(kept, labels, NO_LIST).int()


def threshold_for(gains: Tensor, copies: float) -> float:
    """The gate below which a share ``copies`` − 1 of sampled ``gains`` lies."""
    share = copies - 1
    if share >= 1:
        return float("inf")
    count = round(share * len(gains))
    if count == 0:
        return -1.0
    ordered = gains.sort().values
    return float(ordered[count]) if count < len(gains) else float("inf")
