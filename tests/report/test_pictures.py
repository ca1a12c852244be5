"""What the pictures show, read back from the figures."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.collections import EllipseCollection, PathCollection

from streamgmm.errors import RequestError
from streamgmm.mixture import Mixture
from streamgmm.report import (
    condition_numbers,
    convergence,
    effective_components,
    projection,
    selection,
    throughput,
    weights,
)
from tests.oracles import COVARIANCE_TYPES, random_mixture
from tests.report.conftest import history


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


SHAPES = [(kind, k, d) for kind in COVARIANCE_TYPES for k, d in ((1, 1), (2, 3))] + [("diag", 601, 3)]


@pytest.mark.parametrize(("kind", "k", "d"), SHAPES)
def test_every_shape_is_drawn(kind, k, d):
    mixture = random_mixture(kind, k, d)
    for draw in (weights, condition_numbers, projection):
        assert png(draw(mixture)).startswith(b"\x89PNG")


@pytest.mark.parametrize("n", [0, 1, 2, 1500])
def test_every_length_of_history_is_drawn(n):
    for draw in (convergence, effective_components, throughput):
        figure = draw(history(n, candidates=2))
        assert png(figure).startswith(b"\x89PNG")
        assert all(len(line.get_xdata()) <= 1000 for axis in figure.axes for line in axis.lines)


def test_convergence_is_what_the_history_says():
    records = history(7)
    bound, bound_by_pass, change, _ = convergence(records).axes
    np.testing.assert_array_equal(bound.lines[0].get_ydata(), [record["lower_bound"] for record in records])
    np.testing.assert_array_equal(bound_by_pass.lines[0].get_xdata(), [record["n_passes"] for record in records])
    np.testing.assert_array_equal(change.lines[0].get_ydata(), [record["change"] for record in records[1:]])
    assert change.get_yscale() == "log"


def test_a_fall_of_the_bound_is_ringed():
    records = [dict(record) for record in history(5)]
    records[3]["change"] = -0.25
    rings = convergence(records).axes[2].lines[1]
    assert (list(rings.get_xdata()), list(rings.get_ydata())) == ([4], [0.25])


def test_the_best_start_of_each_size_is_strong_and_sizes_are_named():
    axis = effective_components(history(5, candidates=3, sizes=(4, 8))).axes[0]
    strong = [line for line in axis.lines if line.get_alpha() is None]
    assert [line.get_label() for line in strong] == ["4 components", "8 components"]
    assert len(axis.lines) == 6
    assert effective_components(history(5, candidates=2)).axes[0].get_legend() is None


def test_throughput_counts_an_update_once_whatever_the_candidates():
    rate, waiting = throughput(history(4, candidates=3)).axes
    for axis, value in ((rate, 1.5), (waiting, 0.25)):
        values, edges, _ = axis.patches[0].get_data()
        np.testing.assert_allclose(values, value)
        np.testing.assert_allclose(edges, [0, 2, 4, 6, 8])


def test_weights_are_sorted_and_zero_is_left_out():
    mixture = Mixture(np.array([0.25, 0.0, 0.5, 0.25]), np.zeros((4, 2)), np.ones((4, 2)), "diag")
    uniform, line = weights(mixture).axes[0].lines
    assert list(line.get_ydata()) == [0.5, 0.25, 0.25]
    assert uniform.get_ydata()[0] == 0.25


def test_condition_numbers_count_every_component():
    mixture = random_mixture("full", 200, 5)
    values, edges, _ = condition_numbers(mixture).axes[0].patches[0].get_data()
    assert values.sum() == 200
    assert edges[[0, -1]] == pytest.approx(np.sort(np.linalg.cond(mixture.covariances))[[0, -1]])


def test_ellipses_are_one_deviation_and_dots_the_weight():
    # Two directions apart: the plane is that of the first two features.
    means = np.array([[10.0, 0, 0], [-10, 0, 0], [0, 5, 0], [0, -5, 0]])
    variances = np.array([[4.0, 1, 9], [1, 4, 9], [1, 1, 9], [9, 4, 9]])
    mixture = Mixture(np.array([0.4, 0.3, 0.2, 0.1]), means, variances, "diag")
    axis = projection(mixture).axes[0]
    ellipses = [found for found in axis.collections if isinstance(found, EllipseCollection)]
    np.testing.assert_allclose(np.sort(ellipses[0].get_widths()), 2 * np.sort(np.sqrt(variances[:, :2].max(1))))
    np.testing.assert_allclose(np.sort(ellipses[0].get_heights()), 2 * np.sort(np.sqrt(variances[:, :2].min(1))))
    (dots,) = (found for found in axis.collections if type(found) is PathCollection)
    np.testing.assert_allclose(dots.get_sizes() / dots.get_sizes()[0], mixture.weights / 0.4)


def test_a_density_integrates_to_one():
    figure = projection(random_mixture("full", 7, 1))
    line = figure.axes[0].lines[0]
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=1e-3)


TABLE = [
    {"n_components": k, "bic": (k - 16) ** 2 + 9, "aic": (k - 32) ** 2 + 9, "held_out": -abs(k - 16)}
    for k in (64, 16, 32, 8)
]


def test_selection_marks_the_best_of_each_criterion():
    criteria, held_out = selection(TABLE).axes
    rings = [line.get_xdata()[0] for axis in (criteria, held_out) for line in axis.lines if line.get_markersize() > 10]
    assert rings == [16, 32, 16]
    assert list(criteria.lines[0].get_xdata()) == [8, 16, 32, 64]


def test_selection_without_some_criteria():
    assert len(selection([{"n_components": 3, "bic": 1.0}]).axes) == 1
    assert len(selection([{**row, "bic": None, "aic": None} for row in TABLE]).axes) == 1
    for nothing in ([], [{"n_components": 3, "held_out": None}]):
        with pytest.raises(RequestError, match="table must hold"):
            selection(nothing)


def test_pyplot_stays_out_of_it():
    code = """
import json, sys
import numpy as np
from streamgmm.report import weights
from streamgmm.mixture import Mixture
before = "matplotlib" in sys.modules
weights(Mixture(np.ones(1), np.zeros((1, 2)), np.ones((1, 2)), "diag"))
print(json.dumps([before, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True, False]


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"pictures need matplotlib; install streamgmm\[plot\]"):
        weights(random_mixture("diag", 2, 2))
