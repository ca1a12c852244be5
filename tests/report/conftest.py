"""Histories as a recorder writes them, and a browser to look at pages with."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

OFFLINE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom"),
)

MEASURE = """<script>
for (const svg of document.querySelectorAll("figure svg")) {
  const shown = svg.getBoundingClientRect(), drawn = svg.getBBox();
  const size = [shown.width, shown.height, drawn.width, drawn.height].map(Math.round).join(" ");
  const name = svg.closest("figure").id;
  document.body.insertAdjacentHTML("beforeend", `<i data-figure="${name}" data-size="${size}"></i>`);
}
document.body.dataset.overflow = document.documentElement.scrollWidth > window.innerWidth;
document.body.dataset.requests = performance.getEntriesByType("resource").length;
document.body.dataset.paper = getComputedStyle(document.documentElement).backgroundColor;
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser makes of a page: its DOM after scripts, and lines on the console."""

    dom: str
    console: list[str]

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Width and height shown, and of what is drawn, by figure."""
        found = re.findall(r'data-figure="(\w+)" data-size="([\d ]+)"', self.dom)
        return {name: [int(number) for number in size.split()] for name, size in found}

    def measured(self, name: str) -> str:
        match = re.search(rf'<body[^>]* data-{name}="([^"]*)"', self.dom)
        assert match, self.dom[:2000]
        return match[1]


@pytest.fixture
def browse(tmp_path):
    """``browse(page)`` opens HTML text in a headless browser, or a copy of it that lets a script measure."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")

    def visit(page: str, *options: str, measured: bool = True, width: int = 1280) -> Seen:
        if measured:
            page = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
            page = page.replace("</body>", f"{MEASURE}</body>")
        path = tmp_path / "seen.html"
        path.write_text(page)
        profile = tmp_path / "profile"
        shape = (f"--user-data-dir={profile}", f"--window-size={width},900")
        command = [browser, *OFFLINE, *shape, *options, path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        shutil.rmtree(profile, ignore_errors=True)
        return Seen(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])

    return visit


def history(n: int, candidates: int = 1, sizes: tuple[int, ...] = (5,), troubled: bool = False) -> tuple[dict, ...]:
    """``n`` iterations of ``candidates`` starts of each size."""
    records = []
    for i in range(n):
        for j, size in enumerate(size for size in sizes for _ in range(candidates)):
            records.append(
                {
                    "candidate": j,
                    "n_components": size,
                    "iteration": i + 1,
                    "lower_bound": -10.0 / (i + 1) - j,
                    "change": 10.0 / i - 10.0 / (i + 1) if i else None,
                    "precision": "high",
                    "converged": i == n - 1,
                    "empty": [1, 3] if troubled and i in (0, 1, 4) else [],
                    "degenerate": list(range(40)) if troubled and i == n - 1 else [],
                    "n_passes": i + 1.5,
                    "seconds": 2.0 * i,
                    "effective_components": 3 + i / n,
                    "update_seconds": 2.0,
                    "update_bytes": 3 * 10**9,
                    "update_waiting": 0.5,
                }
            )
    return tuple(records)
