"""Is the order of rows exchangeable, and in which order are small steps safe where it is not?

Pass 0 keeps the mean of bounded features of every granule, the shortest run of rows that is read at once. Whatever
order the granules are visited in, the means of steps then follow without another look at the data, and their variance
over what independent rows would show is the design effect (Kish 1965): by how much more rows a step must hold, or a
window, for the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

_BOUND = 3.0


@dataclass(frozen=True, eq=False)
class GranuleMeans:
    """What pass 0 keeps of the order.

    Attributes
    ----------
    means : (G, F) array
        Of each granule.
    rows : (G,) array
    variance : (F,) array
        Of a row about the mean of all.
    """

    means: np.ndarray
    rows: np.ndarray
    variance: np.ndarray


def features(rows: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """z and z² of standardised rows cut off at three deviations, (n, 2D): bounded, so that outliers prove nothing."""
    z = np.clip((rows - centre) / scale, -_BOUND, _BOUND)
    return np.concatenate([z, z**2], axis=1)


def granule_means(granules: Iterable[np.ndarray], centre: np.ndarray, scale: np.ndarray) -> GranuleMeans:
    """One look at every granule, in order."""
    means, squares, rows = [], [], []
    for granule in granules:
        values = features(np.asarray(granule, dtype=np.float64), centre, scale)
        means.append(values.mean(0))
        squares.append((values**2).mean(0))
        rows.append(len(granule))
    mean, square = (np.average(np.array(each), axis=0, weights=rows) for each in (means, squares))
    return GranuleMeans(np.array(means), np.array(rows), square - mean**2)


def design_effects(seen: GranuleMeans, steps: list[np.ndarray]) -> np.ndarray:
    """Variance of the steps' means over that of as many independent rows, (F,), near 1 if exchangeable.

    ``steps`` are the granules of each step, all of them one pass. The largest says whether the order matters, the mean
    how noisy a step is. Constant features are left out.
    """
    rows = np.array([seen.rows[step].sum() for step in steps])
    means = np.array([np.average(seen.means[step], axis=0, weights=seen.rows[step]) for step in steps])
    centre = np.average(means, axis=0, weights=rows)
    varying = seen.variance > 0
    ratios = (rows[:, None] * (means - centre) ** 2)[:, varying] / seen.variance[varying]
    return np.asarray(ratios.sum(0) / (len(steps) - 1))


def limit(n_steps: int, n_features: int) -> float:
    """What the largest effect of exchangeable rows exceeds in one pass of a million, however the features correlate.

    (steps − 1) × effect is χ² for independent rows, by the central limit theorem; features share the risk equally.
    """
    return float(chi2.isf(1e-6 / n_features, n_steps - 1) / (n_steps - 1))


def natural_order(n_granules: int, n_steps: int) -> list[np.ndarray]:
    """Runs of granules as they lie."""
    return np.array_split(np.arange(n_granules), n_steps)
