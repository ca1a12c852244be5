"""A matplotlib figure as SVG text for a page: themed by the page, labelled, and the same bytes every time."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from streamgmm.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """``figure`` as an ``<svg>`` element whose colours and font are the page's CSS variables.

    ``name`` must be unique in the page: the ids within begin with it.
    """
    import matplotlib

    buffer = io.StringIO()
    # The salt makes ids repeatable, the type leaves text as text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=144, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, value in LIGHT.items():
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r"font-family: [^;\"]*|'DejaVu Sans'[^;\"]*", _font, text)
    label = f'<title id="{name}-title">{escape(description)}</title>'
    opening = f'<svg role="img" aria-labelledby="{name}-title"'
    return re.sub(r"(<svg)([^>]*>)", lambda found: opening + found[2] + label, text, count=1)


def _font(found: re.Match[str]) -> str:
    return "font-family: var(--font)" if found[0].startswith("font-family") else "var(--font)"
