"""The page of an auditor's report: drawn from the report's JSON and from nothing else, so every number on it is in that JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from nodes.page import document

FOLDED = 4  # more checks of one thing than this are folded away where all hold
WIDTH, ROW, LABEL = 390, 26, 146  # of a picture: narrow, so that its text stays readable on a telephone
MARKS = {"present": "\u25b2", "absent": "\u2713", "not examined": "\u2013"}  # a state is told by sign and word, not by colour alone
STYLE = """
h2 { border-top: 1px solid var(--grid); font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
code { color: var(--soft); font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere; }
.verdict { font-size: 1.15rem; font-weight: 600; }
.present, .no { color: var(--bad); } .absent, .yes { color: var(--good); }
.not, .unknown, small { color: var(--soft); }
ul.list { list-style: none; margin: .5rem 0; padding: 0; }
ul.list li { border-bottom: 1px solid var(--grid); display: grid; gap: 0 1rem; grid-template-columns: 8.5rem 1fr; padding: .45rem 0; }
ul.list li > * { min-width: 0; overflow-wrap: anywhere; }
dl { display: grid; gap: .1rem 1rem; grid-template-columns: minmax(9rem, max-content) 1fr; margin: .5rem 0; }
dd { font-variant-numeric: tabular-nums; margin: 0; overflow-wrap: anywhere; } dt { color: var(--soft); }
summary { color: var(--good); cursor: pointer; }
svg { margin: .6rem 0; width: 27rem; } svg .bar { fill: var(--c1); }
@media (max-width: 34rem) { ul.list li { grid-template-columns: 1fr; } }
"""


def page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a report that was read from its file."""
    return document("Auditor's report", STYLE, body(report))


def body(report: Mapping[str, Any]) -> str:
    """Return what the page says, as markup that a page of another frame can hold; all text of the report is escaped."""
    summary = report["summary"]
    verdict = "A claim is refuted" if summary["refuted"] else "No claim is refuted"
    sections = "\n".join(_section(section) for section in report["sections"])
    return f"""<p>{escape(report["on"])}, veilmart {escape(report["version"])}, Python {escape(report["python"])}.
Drawn from report.json alone.</p>
<p class="verdict {"present" if summary["refuted"] else "absent"}">{MARKS["present" if summary["refuted"] else "absent"]} {verdict}</p>
<p>{escape(summary["claim"])}</p>
<dl><dt>audits</dt><dd>{_number(summary["audits"])}</dd><dt>of them refuted</dt><dd>{_number(summary["refuted_audits"])}</dd>
<dt>hazards present</dt><dd>{_number(summary["hazards_present"])}</dd><dt>hazards absent</dt><dd>{_number(summary["hazards_absent"])}</dd>
<dt>not examined</dt><dd>{_number(summary["hazards_not_examined"])}</dd></dl>
<small>counted by <code>{escape(summary["command"])}</code></small>
<h2>Hazards</h2>
<ul class="list">
{"".join(_hazard(hazard) for hazard in report["hazards"])}</ul>
{sections}
<h2>Audits that were run</h2>
<ul class="list">
{"".join(_run(entry) for entry in report["results"])}</ul>
<p>This page and its JSON are signed by nobody: <code>veilmart audit export --with report.json</code> puts the JSON beside the signed
releases that it speaks of, under one fingerprint.</p>"""


def _section(section: Mapping[str, Any]) -> str:
    text = "\n".join(f"<p>{_text(line)}</p>" for line in section["text"])
    return f"<h2>{escape(section['title'])}</h2>\n{text}\n" + "\n".join(_part(part) for part in section["parts"])


def _part(part: Mapping[str, Any]) -> str:
    figures = "".join(f"<dt>{escape(figure['name'])}</dt><dd>{_number(figure['value'])}</dd>" for figure in part["figures"])
    checks = "".join(_check(check) for check in part["checks"])
    picture = _picture(part["picture"]) if "picture" in part else ""
    listed = f'<ul class="list">\n{checks}</ul>' if checks else ""
    if len(part["checks"]) > FOLDED and all(check["holds"] for check in part["checks"]):
        listed = f"<details><summary>all its checks hold</summary>{listed}</details>"
    return (
        f"<h3>{escape(part['title'])}</h3>\n<small>from <code>{escape(part['command'])}</code></small>\n"
        f"<dl>{figures}</dl>\n{picture}{listed}"
    )


def _check(check: Mapping[str, Any]) -> str:
    kind, word = {True: ("yes", "holds"), False: ("no", "does NOT hold")}.get(check["holds"], ("unknown", "unknown"))
    mark = {"yes": MARKS["absent"], "no": MARKS["present"]}.get(kind, MARKS["not examined"])
    told = f"<span>{escape(check['evidence'])} <code>{escape(check['command'])}</code></span>"
    return f'<li><span class="{kind}">{mark} {word}</span><span><strong>{escape(check["name"])}</strong><br>{told}</span></li>\n'


def _hazard(hazard: Mapping[str, Any]) -> str:
    seen = "".join(f"<br>{escape(check['evidence'])} <code>{escape(check['command'])}</code>" for check in hazard["evidence"])
    if not seen:
        commands = ", ".join(hazard["examined_by"])
        seen = (
            f"<br><small>examined by <code>{escape(commands)}</code></small>" if commands else "<br><small>only the owner can say</small>"
        )
    state = hazard["state"]
    return (
        f'<li><span class="{state}">{MARKS[state]} {state}</span>'
        f"<span><strong>{escape(hazard['name'])}</strong>: {escape(hazard['means'])}{seen}</span></li>\n"
    )


def _run(entry: Mapping[str, Any]) -> str:
    refuted = entry["result"].get("refuted")
    kind, word = {True: ("no", "refuted"), False: ("yes", "not refuted")}.get(refuted, ("unknown", "no claim"))
    return f'<li><span class="{kind}">{word}</span><code>{escape(entry["command"])}</code></li>\n'


def _picture(picture: Mapping[str, Any]) -> str:
    """Return bars beside each other, each with its label and its number."""
    bars: Sequence[Mapping[str, Any]] = picture["bars"]
    most = max((float(bar["value"]) for bar in bars), default=0.0) or 1.0
    parts = [f'<svg viewBox="0 0 {WIDTH} {ROW * len(bars)}" role="img" aria-label="{escape(picture["title"])}">']
    for row, bar in enumerate(bars):
        length = max(float(bar["value"]), 0.0) / most * (WIDTH - LABEL - 60)
        parts.append(
            f'<text class="soft" x="0" y="{row * ROW + 17}">{escape(bar["label"])}</text>'
            f'<rect class="bar" x="{LABEL}" y="{row * ROW + 5}" width="{length:.1f}" height="15" rx="2"/>'
            f'<text x="{LABEL + length + 6:.1f}" y="{row * ROW + 17}">{_number(bar["value"])}</text>'
        )
    return f"<p>{escape(picture['title'])}</p>\n" + "".join(parts) + "</svg>\n"


def _text(line: str) -> str:
    """Return a line with what stands between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(line))


def _number(value: Any) -> str:
    """Return a value as the JSON spells it, so that it can be found there."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(value if isinstance(value, str) else json.dumps(value))
