"""The frame of every page that veilmart writes: one file, no script, nothing fetched, light and dark in the colours of the web pages."""

from __future__ import annotations

from html import escape
from importlib.resources import files

STYLE = """
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
svg { display: block; height: auto; max-width: 100%; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--grid); } svg .lead { stroke: var(--soft); stroke-width: .7; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 1.5rem; width: 100%; }
th, td { border-bottom: 1px solid var(--grid); padding: .35rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; } p { max-width: 46rem; }
"""


def document(title: str, style: str, body: str) -> str:
    """Return an HTML page; `style` and `body` are markup, the title is text.  The policy lets a browser load nothing at all."""
    palette = (files("protocol") / "web" / "static" / "palette.css").read_text()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{palette}{STYLE}{style}</style></head><body>
<main><h1>{escape(title)}</h1>
{body}
</main></body></html>
"""
