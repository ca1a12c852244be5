"""A rule of probing that reaches a wanted recall."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamgmm.ann.ground_truth import checked_truth, exact_neighbours
from streamgmm.ann.layout import lay_out
from streamgmm.ann.placement import check, settle
from streamgmm.ann.policies import Policy
from streamgmm.ann.probing import Probing
from streamgmm.ann.quantizer import quantizer_of
from streamgmm.ann.ways import WAYS, Asked, Ways
from streamgmm.errors import RequestError
from streamgmm.inference import InferenceSettings
from streamgmm.io.sources import open_source


def calibrate_probing(
    data: Any,
    queries: NDArray[Any],
    model: Any,
    policy: Policy | str | None = None,
    *,
    copies: float | None = None,
    recall: float = 0.99,
    k: int = 10,
    way: str = "odds",
    truth: NDArray[np.int64] | None = None,
    settings: InferenceSettings | None = None,
) -> Probing:
    """What `Searcher.search` needs for a mean ``recall`` of ``k`` neighbours on ``queries`` (Q, D) and ones like them.

    Parameters
    ----------
    way : {'odds', 'count', 'margin', 'mass', 'posterior'}
        `Probing`'s rule to stop by; ``posterior`` ranks by posterior and takes a fixed number of lists.
    truth : (Q, k) array, optional
        Row numbers of the true neighbours; computed where they are not given.

    Warns
    -----
    UserWarning
        A fixed number of nearest lists, the simplest way, would need fewer distance computations.

    Raises
    ------
    RequestError
        ``recall`` is out of range or the lists cannot reach it; and as `assign`.
    """
    source, quantizer = open_source(data), quantizer_of(model)
    settings = settings or InferenceSettings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policy = Policy(policy) if isinstance(policy, str) else policy or Policy()
    if way not in WAYS:
        raise RequestError(f"way must be one of {', '.join(WAYS)}; got {way!r}")
    if not 0 < recall <= 1:
        raise RequestError(f"recall must lie above 0 and be at most 1; got {recall}")
    if k < 1:
        raise RequestError(f"k must be at least 1; got {k}")
    check(source, quantizer, policy, None)
    if truth is None:
        truth = exact_neighbours(source, queries, k, settings)
    truth = checked_truth(truth, len(queries), source.shape[0], k)
    policy = settle(source, quantizer, policy, copies, 1.0, settings)
    layout = lay_out(source, quantizer, [policy], settings)
    (table,) = layout.tables
    ways = Ways(layout, [Asked(np.asarray(queries, np.float32), truth)], recall)
    probing, (found,) = ways.curves(table, way)
    point = found.at(recall)
    if point is None:
        raise RequestError(f"recall {recall} is not reached by way {way!r}; ask for less, or use way 'count'")
    plain = ways.plain_cost(table, recall)
    if point.unique > plain:
        warnings.warn(
            f"way {way!r} takes {point.unique:.0f} distance computations a query at recall {recall:g}, and a fixed "
            f"number of nearest lists {plain:.0f}; use way 'count'",
            stacklevel=2,
        )
    return probing.at(point.value)
