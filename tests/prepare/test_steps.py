"""What steps learn from one pass is what scikit-learn learns from data in memory."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler, normalize

from streamgmm.errors import DataError, RequestError
from streamgmm.prepare import Pca, Standardise, prepare
from streamgmm.prepare.moments import Moments
from streamgmm.prepare.request import chosen, parse_columns, parse_steps
from streamgmm.prepare.steps import EXAMPLES, parse_step
from streamgmm.transforms import Linear, Scale
from tests.prepare.conftest import raw_rows

PEERS = {
    "standardise": lambda x: StandardScaler().fit_transform(x),
    "l2": normalize,
    "pca=3": lambda x: PCA(3, svd_solver="full").fit_transform(x),
    "whiten=5": lambda x: PCA(5, svd_solver="full", whiten=True).fit_transform(x),
    "standardise,pca=4": lambda x: PCA(4, svd_solver="full").fit_transform(StandardScaler().fit_transform(x)),
    "l2,pca=2": lambda x: PCA(2, svd_solver="full").fit_transform(normalize(x)),
    "standardise,l2,whiten=3": lambda x: PCA(3, svd_solver="full", whiten=True).fit_transform(
        normalize(StandardScaler().fit_transform(x))
    ),
    "pca=6,standardise": lambda x: StandardScaler().fit_transform(PCA(6, svd_solver="full").fit_transform(x)),
}


@pytest.mark.parametrize("steps", PEERS)
def test_against_scikit_learn(here, steps):
    x = raw_rows().astype(np.float64)
    found = prepare("x.npy", "y.zarr", steps, dtype="float64")
    rows = zarr.open_array("y.zarr", mode="r")[:]
    expected = PEERS[steps](x)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert found.transformation.n_features_out == expected.shape[1]


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7])
def test_nothing_cancels_however_far_from_zero_the_rows_lie(here, offset):
    x = raw_rows().astype(np.float64) + offset
    np.save("far.npy", x)
    prepare("far.npy", "y.zarr", "whiten=8", dtype="float64")
    expected = PCA(8, svd_solver="full", whiten=True).fit_transform(x)
    np.testing.assert_allclose(zarr.open_array("y.zarr", mode="r")[:], expected, atol=1e-5 * np.abs(expected).max())


def test_steps_in_a_row_take_one_pass_over_the_data(here):
    assert set(prepare("x.npy", "a.zarr", "standardise,pca=4,whiten=2").stages) == {"survey-0", "writing"}
    assert set(prepare("x.npy", "b.zarr", "standardise,l2,pca=2").stages) == {"survey-0", "survey-1", "writing"}
    assert set(prepare("x.npy", "c.zarr", "l2,project=3").stages) == {"writing"}
    assert set(prepare("x.npy", "d.zarr", "project=3,pca=2").stages) == {"survey-0", "writing"}


def test_steps_learn_from_the_rows_that_are_not_held_out(here):
    prepare("x.npy", "y.zarr", "standardise", holdout=0.5, ids=True, dtype="float64")
    ids = zarr.open_array("y.ids.zarr", mode="r")[:]
    expected = StandardScaler().fit(raw_rows().astype(np.float64)[ids])
    held = zarr.open_array("y.held-out.ids.zarr", mode="r")[:]
    rows = zarr.open_array("y.held-out.zarr", mode="r")[:]
    np.testing.assert_allclose(rows, expected.transform(raw_rows()[held].astype(np.float64)), rtol=1e-5, atol=1e-9)


def test_missing_values_become_the_mean_of_those_that_are_there(here):
    x = raw_rows().astype(np.float64)
    x[::7, 2] = np.nan
    x[5] = np.nan
    np.save("holes.npy", x)
    prepare("holes.npy", "y.zarr", "impute=mean,standardise", dtype="float64")
    expected = StandardScaler().fit_transform(SimpleImputer().fit_transform(x))
    np.testing.assert_allclose(zarr.open_array("y.zarr", mode="r")[:], expected, atol=1e-9)
    prepare("holes.npy", "z.zarr", "impute=-1.5")
    filled = np.where(np.isnan(x), -1.5, x).astype(np.float32)
    assert np.array_equal(zarr.open_array("z.zarr", mode="r")[:], filled)


def test_constant_columns_become_zero_and_zero_rows_stay(here):
    x = raw_rows().astype(np.float64)
    x[:, 3] = 7.3
    x[4] = 0
    np.save("x.npy", x)
    prepare("x.npy", "y.zarr", "l2")
    assert not zarr.open_array("y.zarr", mode="r")[4].any()
    x[4, 3] = 7.3
    np.save("c.npy", x)
    prepare("c.npy", "z.zarr", "standardise", dtype="float64")
    assert np.abs(zarr.open_array("z.zarr", mode="r")[:, 3]).max() < 1e-12


def test_whitening_to_more_directions_than_there_are_is_refused(here):
    x = raw_rows()
    x[:, 5] = x[:, 4]
    np.save("flat.npy", x)
    with pytest.raises(DataError, match="vary in 7 directions only; ask for 7 at most"):
        prepare("flat.npy", "y.zarr", "whiten=8")


def test_a_random_projection_keeps_distances_on_average(here):
    np.save("wide.npy", np.random.default_rng(0).normal(size=(500, 400)))
    prepare("wide.npy", "y.zarr", "project=200@3", dtype="float64")
    x, y = np.load("wide.npy"), zarr.open_array("y.zarr", mode="r")[:]
    ratio = np.linalg.norm(y[::2] - y[1::2], axis=1) / np.linalg.norm(x[::2] - x[1::2], axis=1)
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 0.1


def test_int8_is_told_what_one_unit_stands_for(here):
    found = prepare("x.npy", "y.zarr", "standardise", dtype="int8")
    rows = zarr.open_array("y.zarr", mode="r")[:]
    expected = StandardScaler().fit_transform(raw_rows().astype(np.float64))
    assert rows.dtype == np.int8
    assert np.abs(rows).max() == 127
    assert np.abs(rows * found.transformation.quantum - expected).max() <= found.transformation.quantum / 2 * 1.001


def test_moments_add_up_in_any_cut():
    x = raw_rows(500).astype(np.float64) + 1e6
    whole = Moments.of(x, full=True)
    parts = [Moments.of(part, full=True) for part in np.split(x, [1, 50, 51, 400])]
    total = Moments.none(8, full=True)
    for part in parts:
        total = total + part
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(total.scatter, whole.scatter, rtol=1e-9, atol=1e-9 * np.abs(whole.scatter).max())
    matrix, centre = np.random.default_rng(1).normal(size=(8, 3)), np.full(8, 1e6)
    moved = whole.through(Scale(centre, np.arange(1.0, 9))).through(Linear(np.zeros(8), matrix))
    direct = Moments.of((x - centre) / np.arange(1.0, 9) @ matrix, full=True)
    np.testing.assert_allclose(moved.mean, direct.mean, rtol=1e-6)
    np.testing.assert_allclose(moved.scatter, direct.scatter, rtol=1e-6)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_read_and_written_alike(text):
    assert parse_step(text).text in (text, f"{text}.0")
    assert parse_step(parse_step(text).text) == parse_step(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("scale", "steps must be among drop"),
        ("pca", "must be written as pca=32"),
        ("pca=x", "needs a number"),
        ("drop=3", "must be written as drop"),
        ("impute=nan", "needs a number"),
        ("l2=2", "must be written as l2"),
    ],
)
def test_what_is_no_step(text, told):
    with pytest.raises(RequestError, match=told):
        parse_step(text)


def test_steps_and_columns_as_text_or_objects():
    assert parse_steps("standardise, pca=3") == (Standardise(), Pca(3)) == parse_steps(["standardise", Pca(3)])
    assert chosen(parse_columns("0:3,7"), 8, "x").tolist() == [0, 1, 2, 7]
    assert parse_columns("a,b") == ("a", "b")
    for wrong in ("8", "0:2,1", "5:5"):
        with pytest.raises(RequestError, match="columns"):
            chosen(parse_columns(wrong), 8, "x")
    with pytest.raises(RequestError, match="all names or all numbers"):
        chosen(("a", 1), 8, "x")


@pytest.mark.parametrize("first", ["standardise,project=8", "project=6", "standardise,project=4"])
def test_what_is_learnt_behind_a_random_projection(here, first):
    """Moments are carried through it, or found in another pass where only variances were known."""
    prepare("x.npy", "a.zarr", first, dtype="float64")
    before = zarr.open_array("a.zarr", mode="r")[:]
    for step, peer in (("pca=3", PCA(3, svd_solver="full")), ("standardise", StandardScaler())):
        prepare("x.npy", "b.zarr", f"{first},{step}", dtype="float64", fresh=True)
        expected = peer.fit_transform(before)
        np.testing.assert_allclose(zarr.open_array("b.zarr", mode="r")[:], expected, atol=1e-5 * np.abs(expected).max())
