"""The page of a run: one HTML file without scripts and without anything from elsewhere."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile

from streamgmm._version import __version__
from streamgmm.errors import RequestError
from streamgmm.report.captions import Picture, pictures_of
from streamgmm.report.facts import how_it_ended, settings_of, tiles_of, troubles_of
from streamgmm.report.records import RunRecord
from streamgmm.report.svg import inline_svg
from streamgmm.report.theme import DARK, LIGHT
from streamgmm.storage import write_atomic

_MARK = '<meta name="generator" content="streamgmm report">'
_MARK_WITHIN = 400
"""Bytes at the beginning of a report that hold the mark."""

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif'


def write_report(record: RunRecord, path: str | Path) -> int:
    """Write the page of a run to ``path``, whole or not at all; its size in bytes.

    Raises
    ------
    RequestError
        ``path`` cannot be written, or is a file that no report was written to before; or matplotlib is missing.
    """
    path = Path(path)
    try:
        there = _beginning(path)
        # Before the pictures are drawn; a nameless file, since os.access grants root everything.
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); name another --output") from None
    if there is not None and _MARK.encode() not in there:
        raise RequestError(f"{path}: exists and is no report, so it is not replaced; remove it, or name another")
    page = render(record).encode()
    write_atomic(path, page)
    return len(page)


def _beginning(path: Path) -> bytes | None:
    """The first bytes of a file, or None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return file.read(_MARK_WITHIN)


def render(record: RunRecord) -> str:
    """The page as text: the same bytes for the same run."""
    name = record.path.resolve().name
    state = ("done", how_it_ended(record)) if record.finished else ("open", "unfinished, from its latest checkpoint")
    shown = "\n".join(_figure(picture) for picture in pictures_of(record))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{_MARK}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} · streamgmm</title>
<style>
{_style()}</style>
</head>
<body>
<header><h1>{escape(name)}</h1><span class="state {state[0]}">{escape(state[1])}</span></header>
<main>
<dl class="tiles">
{tiles_of(record)}
</dl>
<h2>Pictures</h2>
<div class="pictures">
{shown}
</div>
<h2>What went wrong</h2>
{troubles_of(record)}
<h2>Settings</h2>
{settings_of(record)}
</main>
<footer>streamgmm {escape(__version__)} · digest <code>{record.mixture.digest}</code></footer>
</body>
</html>
"""


def _figure(picture: Picture) -> str:
    kind = ' class="wide"' if picture.wide else ""
    return (
        f'<figure id="{picture.name}"{kind}><h3>{escape(picture.title)}</h3>\n'
        f'<div class="canvas">{inline_svg(picture.figure, picture.name, picture.alt)}</div>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _style() -> str:
    def variables(theme: dict[str, str]) -> str:
        return " ".join(f"--{name}: {value};" for name, value in theme.items())

    sheet = files("streamgmm.report").joinpath("page.css").read_text()
    return (
        f":root {{ color-scheme: light dark; --font: {_FONT}; {variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n{sheet}"
    )
