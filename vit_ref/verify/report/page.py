"""A `CandidateReport` as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vit_ref.verify.gates import apart
from vit_ref.verify.report.document import to_json
from vit_ref.verify.report.plot import figure, plot
from vit_ref.verify.results import CandidateReport

Fields = dict[str, Any]
_STYLE = Path(__file__).with_name("page.css")
_NUMBER, _WHOLE = re.compile(r"[\d.]+e[-+]\d+"), r'<span class="n">\g<0></span>'
# Not by colour alone: every status has a sign of its own.
SIGNS = {"passed": "✓", "failed": "✗", "not observed": "?", "expected failure": "○", "stale expectation": "!"}


def to_html(report: CandidateReport) -> str:
    """A report as a page. Every number on it is in `to_json(report)`."""
    document = to_json(report)
    verdict = "passed" if document["passed"] else "failed"
    title = f"{document['candidate']} on {document['title']}"
    sections = [name for name in ("forward", "backward") if document[name]]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{verdict}: {escape(title)}</title>",
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>",
            '<svg width="0" height="0" aria-hidden="true">'
            '<defs><path id="diamond" d="M0-4.5 4.5 0 0 4.5-4.5 0z"/></defs></svg>',
            f'<header class="{verdict}"><p class="verdict">{SIGNS[verdict]} {verdict}</p>',
            f"<div><h1>{escape(title)}</h1>",
            f"<p>judged in float64 and {escape(document['precision'])} against {escape(document['reference'])}"
            "</p></div></header>",
            _counts(document["counts"]),
            '<main>\n<div class="cards">',
            *(_card(name, document) for name in sections),
            _rest(document),
            _card_of_terms("Checkpoint", {k: v for k, v in document["checkpoint"].items() if v}),
            _card_of_terms("Environment", document["environment"]),
            "</div>",
            *(_figure(name, document) for name in sections),
            *(_numbers(name, document) for name in sections),
            _not_observed(document),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _counts(counts: Fields) -> str:
    shown = []
    for status, count in counts.items():
        kind = "" if count else ' class="none"'
        shown.append(f"<li{kind}><b>{count}</b> {_status(status)}</li>")
    return f'<ul class="counts" aria-label="Checks by status">{"".join(shown)}</ul>'


def _card(name: str, document: Fields) -> str:
    """What an engineer wants to know first: does it pass, where does it go wrong, why."""
    section = document[name]
    verdict = "passed" if section["passed"] else "failed"
    said = _terms(_findings(name, document))
    return f'<section class="card {verdict}"><h2>{name.title()} {_status(verdict)}</h2>{said}</section>'


def _findings(name: str, document: Fields) -> Iterable[tuple[str, str]]:
    section, precision = document[name], document["precision"]
    checks = section["checks"]
    seen = [check for check in checks if check["measured"]]
    unshown = [check for check in checks if not check["measured"] and check["status"] != "not observed"]
    if unshown:
        yield "Claimed, never shown", _listed([check["site"] for check in unshown])
    if section["first_divergence"]:
        index, first = next((k, c) for k, c in enumerate(checks) if c["site"] == section["first_divergence"])
        yield "First divergence", f'<a href="#{name}-{index}">{escape(first["site"])}</a>'
        measured = first["measured"]
        agree = measured["passes_semantic_gate"] and not measured["incomparable"]
        yield "Error there", escape(f"{'the formulas agree; ' if agree else ''}{measured['failure']}")
    for cause in section["causes"]:
        yield "Likely cause", f"<b>{escape(cause['label'])}</b>{escape(cause['text'].removeprefix(cause['label']))}"
    if section["beyond_rounding"]:
        yield "Not explained by this rounding", escape(section["beyond_rounding"])
    if section["place"]:
        yield "Wrong", escape(section["place"])
    if section["hidden"]:
        yield "Not shown right before", f"{_listed(section['hidden'])}: it may have begun there"
    if section["wrong_alone"]:
        parts = [f"{each['part']} {figure(each['rms'])}" for each in section["wrong_alone"]]
        yield "Wrong by itself", f"{_listed(parts)}: fed the reference's input ({section['alone_precision']})"
    exact = max(seen, key=lambda check: float(check["measured"]["exact"]["rms"]))
    tight = min(seen, key=lambda check: float(check["measured"]["margin"]))
    largest = exact["measured"]["incomparable"] or figure(exact["measured"]["exact"]["rms"])
    yield "Largest float64 error", f"{escape(largest)} at {escape(exact['site'])}"
    yield "Smallest margin", f"{_margin(tight['measured']['margin'])} at {escape(tight['site'])} ({precision})"
    if name == "forward":
        output = seen[-1]["measured"]
        multiple = f"{_multiple(output['ratio'])} &times; {escape(document['reference'])}'s own {precision} error"
        yield "Output", escape(output["incomparable"]) or f"{figure(output['rounding'])}, {multiple}"


def _rest(document: Fields) -> str:
    """Behaviour, what was not measured at all, and what was to fail."""
    rows = [
        [escape(each["name"]), _status(each["status"]), _maybe(each["error"]), escape(each["reason"])]
        for each in document["behaviour"]
    ]
    parts = ["<h2>Behaviour</h2>", _table(("property", "status", "float64", "why"), rows)]
    if document["not_backward"]:
        parts.append(f"<p>No gradients were judged: {escape(document['not_backward'])}.</p>")
    parts += [f"<p>Note: {escape(note)}.</p>" for note in document["notes"]]
    if document["expected_failed_checks"]:
        rows = [
            [f"<code>{escape(each['pattern'])}</code>", str(each["failed"]), str(each["stale"]), escape(each["reason"])]
            for each in document["expected_failed_checks"]
        ]
        parts.append("<h2>Expected failures</h2>")
        parts.append(_table(("pattern", "failed", "passed: stale", "reason"), rows))
    return f'<section class="card">{"".join(parts)}</section>'


def _figure(name: str, document: Fields) -> str:
    section = document[name]
    failed = sum(check["status"] not in ("passed", "not observed") for check in section["checks"])
    label = (
        f"{name.title()} errors of {len(section['checks'])} {section['what']} against their gates, {failed} failed."
        f" First divergence: {section['first_divergence'] or 'none'}. The numbers are in the table below."
    )
    legend = {
        '<circle class="ok" cx="7" cy="7" r="3"/>': "the port, passing",
        '<use class="bad" href="#diamond" x="7" y="7"/>': "the port, failing",
        '<use class="expected" href="#diamond" x="7" y="7"/>': "failing as expected",
        '<circle class="alone" cx="7" cy="7" r="3.5"/>': "the port, each block fed the reference's input",
        '<circle class="own" cx="7" cy="7" r="3"/>': f"{escape(document['reference'])}'s own error",
        '<rect class="beyond" width="14" height="8"/><rect class="gate" y="7" width="14" height="2"/>': "its gate",
        '<rect class="hidden" width="14" height="14"/>': "not shown by the port",
    }
    pooled = f" Rounding is pooled over {section['objectives']} objectives." if section["objectives"] else ""
    items = "".join(f'<li><svg class="key" aria-hidden="true">{key}</svg> {text}</li>' for key, text in legend.items())
    return (
        f'<figure><h2 id="{name}">{name.title()}: error per {section["what"][:-1]}</h2>'
        f"{plot(section, document, label)}"
        f'<figcaption><ul class="legend">{items}</ul><p>Relative RMS error against the float64 oracle, in the order of'
        " the pass, one column each, blocks numbered below. An error of zero is drawn on the line marked 0, one that is"
        " not finite, of another shape or too large for the axis on the line marked ∞."
        f"{pooled}</p></figcaption></figure>"
    )


def _numbers(name: str, document: Fields) -> str:
    section = document[name]
    columns: dict[str, Callable[[Fields], str]] = {
        "float64": lambda measured: figure(measured["exact"]["rms"]),
        "its maximum": lambda measured: figure(measured["exact"]["max"]),
        document["precision"]: lambda measured: _beside(measured)[0] if measured["rounding"] else "0",
        document["reference"]: lambda measured: figure(measured["reference_error"]),
        "ratio": lambda measured: _multiple(measured["ratio"]),
        "gate": lambda measured: _beside(measured)[1],
        "margin": lambda measured: _margin(measured["margin"]),
    }
    if any(check["measured"] and check["measured"]["alone"] for check in section["checks"]):
        columns[f"alone, {section['alone_precision']}"] = lambda measured: _maybe(
            measured["alone"] and measured["alone"]["rms"]
        )
    rows = [
        [
            escape(check["site"]),
            _status(check["status"]),
            *(
                [column(check["measured"]) for column in columns.values()]
                if check["measured"]
                else [escape(check["reason"])]
            ),
        ]
        for check in section["checks"]
    ]
    headers = (section["what"][:-1], "status", *columns)
    opened = "" if section["passed"] else " open"
    return (
        f"<details{opened}><summary>{name.title()}: all {len(rows)} {section['what']} with their margins</summary>"
        f"<p>Relative errors against the float64 oracle. Margin: gate over error; below 1 fails. Ratio: the port's"
        f" error over {escape(document['reference'])}'s.</p>{_table(headers, rows, name)}</details>"
    )


def _not_observed(document: Fields) -> str:
    parts = []
    for name in ("forward", "backward"):
        section = document[name] or {"what": "gradients", "checks": []}
        names = [check["site"] for check in section["checks"] if check["status"] == "not observed"]
        said = f"<p>{escape(', '.join(names))}</p>" if names else ""
        parts.append(f"<h3>{name.title()}: {len(names)} {section['what']}</h3>{said}")
    return f"<details><summary>What was not observed</summary>{''.join(parts)}</details>"


def _card_of_terms(title: str, fields: Fields) -> str:
    said = _terms((key, escape(value)) for key, value in fields.items())
    return f'<section class="card"><h2>{title}</h2>{said}</section>'


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A definition list, in which no number is broken in two."""
    said = "".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in pairs)
    return f"<dl>{_NUMBER.sub(_WHOLE, said)}</dl>"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], name: str = "") -> str:
    """A table of cells that are HTML already; a row shorter than the headers ends in one wide cell."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in headers)
    body = []
    for k, (first, *cells) in enumerate(rows):
        span = len(headers) - len(cells)
        *narrow, last = cells
        wide = f' colspan="{span}"' if span > 1 else ""
        label = f' id="{name}-{k}"' if name else ""
        inner = "".join(f"<td>{each}</td>" for each in narrow) + f"<td{wide}>{last}</td>"
        body.append(f'<tr{label}><th scope="row">{first}</th>{inner}</tr>')
    # What scrolls has to be reached by keyboard.
    reached = f' tabindex="0" role="region" aria-label="{name} numbers"' if name else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll table"{reached}>{table}</div>'


def _status(status: str) -> str:
    return f'<span class="{_slug(status)}">{SIGNS[status]} {status}</span>'


def _slug(status: str) -> str:
    return status.replace(" ", "-")


def _listed(names: Sequence[str]) -> str:
    return escape(", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""))


def _maybe(value: float | str | None) -> str:
    return "" if value is None else figure(value)


def _beside(measured: Fields) -> tuple[str, str]:
    return apart(float(measured["rounding"]), float(measured["gate"]))


def _margin(value: float | str) -> str:
    return apart(float(value), 1.0, 3, "g")[0] if float(value) < 1 else _multiple(value)


def _multiple(value: float | str) -> str:
    number = float(value)
    return f"{number:.3g}" if number < 10 else f"{number:,.0f}"
