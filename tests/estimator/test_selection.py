"""Several sizes, one pass, one table."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from streamgmm import GaussianMixture, select_components
from streamgmm.errors import RequestError
from tests.oracles import clustered

mpl.use("agg")

X = clustered(6001, 4, 3, spread=6.0)


@pytest.mark.parametrize(("criterion", "holdout"), [("bic", 0.0), ("auto", 0.2), ("aic", 0.2)])
def test_the_best_is_the_one_the_data_was_made_of(criterion, holdout):
    selection = select_components(
        X, [1, 2, 4, 7], criterion=criterion, holdout=holdout, covariance_type="spherical", random_state=0, device="cpu"
    )
    assert selection.best.n_components == (4 if criterion != "aic" else selection.best.n_components)
    assert selection.criterion == ("held_out" if criterion == "auto" else criterion)
    assert [row["n_components"] for row in selection.table] == [1, 2, 4, 7]
    assert str(selection).count("\n") == 4
    assert "← best" in str(selection).splitlines()[1 + [1, 2, 4, 7].index(selection.best.n_components)]
    assert selection.plot().axes
    assert all((row["held_out"] is not None) == (holdout > 0) for row in selection.table)


def test_each_model_is_an_estimator_as_if_fitted_alone(tmp_path):
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    settings = {"covariance_type": "diag", "random_state": 3, "device": "cpu", "max_iter": 20}
    selection = select_components(tmp_path / "x.npy", (2, 5), checkpoint=tmp_path / "run", **settings)
    for model, row in zip(selection.models, selection.table, strict=True):
        alone = GaussianMixture(model.n_components, **settings).fit(tmp_path / "x.npy")
        np.testing.assert_array_equal(model.means_, alone.means_)
        assert row["bic"] == pytest.approx(alone.bic(tmp_path / "x.npy"), rel=1e-6)
        assert row["aic"] == pytest.approx(alone.aic(tmp_path / "x.npy"), rel=1e-6)
        assert model.predict(X.astype(np.float32)).shape == (len(X),)
    again = select_components(tmp_path / "x.npy", (2, 5), checkpoint=tmp_path / "run", **settings)
    assert again.result.resumed
    assert again.table == selection.table


def test_starting_values_and_nonsense_are_refused():
    with pytest.raises(RequestError, match="at least one"):
        select_components(X, [])
    with pytest.raises(RequestError, match="criterion must be one of auto, bic, aic, held_out; got 'luck'"):
        select_components(X, [2], criterion="luck", device="cpu")
    with pytest.raises(TypeError, match="unexpected keyword"):
        select_components(X, [2], colour="red")
