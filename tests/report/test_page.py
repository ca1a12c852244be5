"""The page as a reader and as a browser see it."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from streamgmm.report import RunRecord, render
from streamgmm.report.troubles import as_ranges, troubles
from tests.oracles import COVARIANCE_TYPES, random_mixture
from tests.report.conftest import history

SETTINGS = {"shape": [5000, 6], "n_components": 5, "start": {"means": [[0.0]], "weights": None}, "tol": 1e-3}
RESULT = {
    "converged": True,
    "n_samples": 5000,
    "n_iter": 9,
    "n_passes": 9.5,
    "lower_bound": -1.25,
    "seconds": 100.0,
    "bytes_streamed": 10**10,
    "peak_host_bytes": 2**30,
    "peak_device_bytes": 0,
}
ALL = {"convergence", "projection", "weights", "conditions", "effective", "throughput"}


def record(kind: str = "full", k: int = 5, d: int = 6, **changed: object) -> RunRecord:
    facts = {"history": history(9, sizes=(k,)), "settings": SETTINGS, "result": RESULT, "finished": True, **changed}
    return RunRecord(path=Path("/data/my run"), mixture=random_mixture(kind, k, d), **facts)


@cache
def usual_page() -> str:
    return render(record())


class Outline(HTMLParser):
    """Ids, figures and links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.figures: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "figure":
            self.figures.append(str(found["id"]))
        self.links += [str(found[name]) for name in ("href", "src", "xlink:href") if found.get(name)]
        self.links += re.findall(r"url\(([^)]*)\)", str(found))


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_browser_shows_every_picture_and_has_no_complaint(browse, kind):
    page = render(record(kind, history=history(9, troubled=True)))
    seen = browse(page)
    assert seen.console == []
    assert seen.sizes.keys() == ALL
    assert all(min(size) > 100 for size in seen.sizes.values()), seen.sizes
    assert seen.measured("requests") == "0"
    assert seen.measured("overflow") == "false"
    assert seen.measured("paper") == "rgb(255, 255, 255)"


def test_a_browser_has_no_complaint_about_the_page_as_it_is(browse):
    seen = browse(usual_page(), measured=False)
    assert seen.console == []
    assert seen.dom.count("<svg") == len(ALL)


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 300), (10_000, 2)])
def test_the_smallest_and_the_largest_mixtures(browse, k, d):
    page = render(record("diag", k, d))
    assert len(page) < 3_000_000
    seen = browse(page, width=400)
    assert seen.console == []
    assert seen.sizes.keys() == ALL
    assert all(min(size[:2]) > 100 for size in seen.sizes.values())
    assert seen.measured("overflow") == "false"


def test_it_is_dark_where_the_reader_s_desktop_is(browse):
    dark = browse(usual_page(), "--blink-settings=preferredColorScheme=0")
    assert dark.measured("paper") == "rgb(18, 21, 28)"
    assert dark.console == []


def test_nothing_comes_from_elsewhere():
    found = outline(render(record("diag", 700, 3)))
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found.links), found.links
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)


def test_every_picture_has_words_for_those_who_cannot_see_it():
    page = render(record())
    titles = re.findall(
        r'<svg role="img" aria-labelledby="(\w+)-title"[^>]*><title id="(\w+)-title">([^<]{30,})</title>', page
    )
    assert {name for name, _, _ in titles} == {name for _, name, _ in titles} == ALL
    assert page.count("<svg") == len(ALL)
    assert page.count("<figcaption>") == len(ALL)


def test_the_same_run_gives_the_same_bytes():
    assert render(record()) == usual_page()


def test_figures_and_settings_are_told():
    page = render(record())
    for told in (
        "my run",
        "converged",
        "5,000",
        "-1.2500",
        "9.5 passes",
        "0.10 GB/s",
        "1.0 GiB",
        "given: means",
        "0.001",
    ):
        assert told in page, told
    assert record().mixture.digest in page
    assert "no component was ever empty or degenerate" in page
    unfinished = render(record(finished=False, result={}))
    assert "unfinished, from its latest checkpoint" in unfinished
    assert "not converged" in render(record(result={**RESULT, "converged": False}))


def test_names_and_settings_are_no_markup():
    hostile = "<script>alert(1)</script>&\"'"
    page = render(RunRecord(Path(hostile), True, random_mixture("diag", 2, 2), (), {hostile: hostile}, {}))
    assert "script" not in outline(page).tags
    assert "&lt;script&gt;" in page


def test_a_model_without_history():
    page = render(record(history=(), settings={}, result={}))
    assert set(outline(page).figures) == {"projection", "weights", "conditions"}
    assert "No history was kept" in page


def test_a_history_of_before_these_fields():
    old = tuple(
        {name: value for name, value in line.items() if not name.startswith(("update", "effective", "n_comp"))}
        for line in history(4)
    )
    assert set(outline(render(record(history=old))).figures) == ALL - {"effective", "throughput"}


def test_several_sizes_are_compared():
    models = tuple({"n_components": k, "bic": k + 100 / k, "aic": float(k), "held_out": None} for k in (3, 5, 9))
    page = render(record(history=history(6, sizes=(3, 5, 9)), models=models))
    assert "selection" in outline(page).figures
    assert "models of 3, 5, 9 components" in page
    # The history that is told of is that of the mixture's own size.
    assert record(history=history(6, sizes=(3, 5, 9)), models=models).best_history[-1]["n_components"] == 5


def test_a_mixture_that_grew_keeps_its_history():
    grown = tuple({**line, "n_components": 2 if line["iteration"] < 4 else 5} for line in history(6))
    assert len(record(history=grown).best_history) == 6


def test_troubles_by_what_lasts_then_by_how_long():
    found = troubles(history(6, troubled=True))
    assert [(t.what, t.component) for t in found[:40]] == [("degenerate", k) for k in range(40)]
    assert all(t.lasting for t in found[:40])
    assert [(t.what, t.component, t.iterations, t.lasting) for t in found[40:]] == [
        ("empty", 1, (1, 2, 5), False),
        ("empty", 3, (1, 2, 5), False),
    ]
    page = render(record(history=history(6, troubled=True)))
    assert "and 17 more" in page
    assert troubles(()) == []


@pytest.mark.parametrize(
    ("numbers", "told"),
    [((), ""), ((4,), "4"), ((1, 2, 3, 7), "1–3, 7"), (tuple(range(1, 99, 2)), "1, 3, 5, 7, 9, 11, …")],
)
def test_ranges(numbers, told):
    assert as_ranges(numbers) == told


def test_weights_that_cannot_be_drawn_are_counted():
    mixture = random_mixture("diag", 4, 3)
    weights = np.array([0.5, 0.5, 0, 0])
    changed = type(mixture)(weights, mixture.means, mixture.covariances, "diag")
    page = render(RunRecord(Path("run"), True, changed, (), {}, {}))
    assert "Not shown: 2 without any weight." in page
    assert "2.0 of 4 components are effective" in page
