"""How scikit-learn's own checks of an estimator end."""

from __future__ import annotations

import warnings
from typing import Any

from sklearn.utils.estimator_checks import check_estimator


def statuses_of(estimator: Any) -> dict[str, str]:
    """Each check's name and status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks' own
        results = check_estimator(estimator, on_skip=None, on_fail=None)
    return {result["check_name"]: result["status"] for result in results}
