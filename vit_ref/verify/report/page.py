"""Turns a `CandidateReport` into one HTML page that loads no script, no font and nothing from the network."""

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
# Each status has its own sign, because a reader may not tell colours apart.
SIGNS = {"passed": "✓", "failed": "✗", "not observed": "?", "expected failure": "○", "stale expectation": "!"}


def to_html(report: CandidateReport) -> str:
    """Returns a report as one HTML page. Every number on the page is in `to_json(report)`.

    Args:
      report: what `check_port` returned.
    """
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
            f"<p>compared in float64 and {escape(document['precision'])} with {escape(document['reference'])}"
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
    items = []
    for status, count in counts.items():
        kind = "" if count else ' class="none"'
        items.append(f"<li{kind}><b>{count}</b> {_status(status)}</li>")
    return f'<ul class="counts" aria-label="Checks by status">{"".join(items)}</ul>'


def _card(name: str, document: Fields) -> str:
    """Answers first whether a pass is right, where it goes wrong, why, and what to do next."""
    section = document[name]
    verdict = "passed" if section["passed"] else "failed"
    terms = _terms(_findings(name, document))
    return f'<section class="card {verdict}"><h2>{name.title()} {_status(verdict)}</h2>{terms}</section>'


def _findings(name: str, document: Fields) -> Iterable[tuple[str, str]]:
    section, precision = document[name], document["precision"]
    checks = section["checks"]
    seen = [check for check in checks if check["measured"]]
    unshown = [check for check in checks if not check["measured"] and check["status"] != "not observed"]
    if unshown:
        yield "Claimed, not shown", _listed([check["site"] for check in unshown])
    if section["first_divergence"]:
        index, first = next((k, c) for k, c in enumerate(checks) if c["site"] == section["first_divergence"])
        yield "First divergence", f'<a href="#{name}-{index}">{escape(first["site"])}</a>'
        measured = first["measured"]
        agree = measured["passes_semantic_gate"] and not measured["incomparable"]
        yield "Error", escape(f"{'the formulas agree in float64; ' if agree else ''}{measured['failure']}")
    for cause in section["causes"]:
        yield "Likely cause", f"<b>{escape(cause['label'])}</b>{escape(cause['text'].removeprefix(cause['label']))}"
    if section["next_step"] and (name == "forward" or document["forward"]["passed"]):
        yield "Next step", escape(section["next_step"])
    if section["beyond_rounding"]:
        yield "Not explained by rounding", escape(section["beyond_rounding"])
    if section["place"]:
        yield "Wrong", escape(section["place"])
    if section["hidden"]:
        yield "May begin earlier", f"{_listed(section['hidden'])}: not observed"
    if section["wrong_alone"]:
        parts = [f"{each['part']} {figure(each['rms'])}" for each in section["wrong_alone"]]
        yield "Wrong even with the reference's input", f"{_listed(parts)} ({section['alone_precision']})"
    if section["not_fed"]:
        yield "Input not replaced", f"{_listed(section['not_fed'])}: differs, and nothing is known of it alone"
    exact = max(seen, key=lambda check: float(check["measured"]["exact"]["rms"]))
    rounded = [check for check in seen if check["measured"]["gate"] is not None]
    site, incomparable = escape(exact["site"]), escape(exact["measured"]["incomparable"])
    largest = f"{site}: {incomparable}" if incomparable else f"{figure(exact['measured']['exact']['rms'])} at {site}"
    wider = float(exact["measured"]["semantic_gate"]) > document["gates"]["float64_rms"]
    yield "Largest float64 error", f"{largest}, gate {figure(exact['measured']['semantic_gate'])}" if wider else largest
    if not rounded:
        yield f"{precision} rounding", "not measured, because the formula is wrong"
        return
    tight = min(rounded, key=lambda check: float(check["measured"]["margin"]))
    yield "Smallest margin", f"{_margin(tight['measured']['margin'])} at {escape(tight['site'])} ({precision})"
    if name == "forward":
        output = seen[-1]["measured"]
        multiple = f"{_multiple(output['ratio'])} &times; {escape(document['reference'])}'s own {precision} error"
        yield "Output", escape(output["incomparable"]) or f"{figure(output['rounding'])}, {multiple}"


def _rest(document: Fields) -> str:
    """Shows the behaviour, the notes and the expected failures."""
    rows = [
        [escape(each["name"]), _status(each["status"]), _maybe(each["error"]), escape(each["reason"])]
        for each in document["behaviour"]
    ]
    parts = ["<h2>Behaviour</h2>", _table(("property", "status", "float64 error", "reason"), rows)]
    if document["not_backward"]:
        parts.append(f"<p>No gradients were compared: {escape(document['not_backward'])}.</p>")
    parts += [f"<p>Note: {escape(note)}.</p>" for note in document["notes"]]
    if document["expected_failed_checks"]:
        rows = [
            [f"<code>{escape(each['pattern'])}</code>", str(each["failed"]), str(each["stale"]), escape(each["reason"])]
            for each in document["expected_failed_checks"]
        ]
        parts.append("<h2>Expected failures</h2>")
        parts.append(_table(("pattern", "failed", "passed (stale)", "reason"), rows))
    return f'<section class="card">{"".join(parts)}</section>'


def _figure(name: str, document: Fields) -> str:
    section = document[name]
    failed = sum(check["status"] not in ("passed", "not observed") for check in section["checks"])
    label = (
        f"{name.title()} errors of {len(section['checks'])} {section['what']} against their gates, {failed} failed."
        f" First divergence: {section['first_divergence'] or 'none'}. The numbers are in the table below."
    )
    legend = {
        '<circle class="ok" cx="7" cy="7" r="3"/>': "candidate, passes",
        '<use class="bad" href="#diamond" x="7" y="7"/>': "candidate, fails",
        '<use class="expected" href="#diamond" x="7" y="7"/>': "candidate, fails as expected",
        '<circle class="alone" cx="7" cy="7" r="3.5"/>': "candidate, each block fed the reference's input",
        '<circle class="own" cx="7" cy="7" r="3"/>': f"{escape(document['reference'])}'s own error",
        '<rect class="beyond" width="14" height="8"/><rect class="gate" y="7" width="14" height="2"/>': "gate",
        '<rect class="hidden" width="14" height="14"/>': "not shown by the candidate",
    }
    pooled = f" Rounding is pooled over {section['objectives']} objectives." if section["objectives"] else ""
    if section["nearby_inputs"]:
        pooled = f" Rounding is that of the given inputs and {section['nearby_inputs']} nearby ones."
    items = "".join(f'<li><svg class="key" aria-hidden="true">{key}</svg> {text}</li>' for key, text in legend.items())
    return (
        f'<figure><h2 id="{name}">{name.title()}: error per {section["what"][:-1]}</h2>'
        f"{plot(section, document, label)}"
        f'<figcaption><ul class="legend">{items}</ul><p>Each column shows relative RMS errors against the float64'
        " oracle, in the order of the pass. The numbers below are blocks. The line 0 shows an error of zero. The line ∞"
        " shows an error that is not finite, too large for the axis, or of a value with a wrong shape."
        f"{pooled}</p></figcaption></figure>"
    )


def _numbers(name: str, document: Fields) -> str:
    section = document[name]
    columns: dict[str, Callable[[Fields], str]] = {
        "float64": lambda measured: figure(measured["exact"]["rms"]),
        "float64 maximum": lambda measured: figure(measured["exact"]["max"]),
        document["precision"]: lambda measured: _beside(measured)[0] if measured["rounding"] else "0",
        document["reference"]: lambda measured: figure(measured["reference_error"]),
        "ratio": lambda measured: _multiple(measured["ratio"]),
        "gate": lambda measured: _beside(measured)[1],
        "margin": lambda measured: _margin(measured["margin"]),
    }
    if all(check["measured"]["gate"] is None for check in section["checks"] if check["measured"]):
        columns = {title: columns[title] for title in ("float64", "float64 maximum")}
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
        "<p>All errors are relative to the right value in float64. Margin is gate over error: a margin below 1 fails."
        f" Ratio is the candidate's error over {escape(document['reference'])}'s.</p>"
        f"{_table(headers, rows, name)}</details>"
    )


def _not_observed(document: Fields) -> str:
    parts = []
    for name in ("forward", "backward"):
        section = document[name] or {"what": "gradients", "checks": []}
        names = [check["site"] for check in section["checks"] if check["status"] == "not observed"]
        listed = f"<p>{escape(', '.join(names))}</p>" if names else ""
        parts.append(f"<h3>{name.title()}: {len(names)} {section['what']}</h3>{listed}")
    return f"<details><summary>Not observed</summary>{''.join(parts)}</details>"


def _card_of_terms(title: str, fields: Fields) -> str:
    terms = _terms((key, escape(value)) for key, value in fields.items())
    return f'<section class="card"><h2>{title}</h2>{terms}</section>'


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Writes a definition list in which no number is broken over two lines."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in pairs)
    return f"<dl>{_NUMBER.sub(_WHOLE, items)}</dl>"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], name: str = "") -> str:
    """Writes a table. Cells are HTML already; a row shorter than the headers ends in one wide cell."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in headers)
    body = []
    for k, (first, *cells) in enumerate(rows):
        span = len(headers) - len(cells)
        *narrow, last = cells
        wide = f' colspan="{span}"' if span > 1 else ""
        label = f' id="{name}-{k}"' if name else ""
        inner = "".join(f"<td>{each}</td>" for each in narrow) + f"<td{wide}>{last}</td>"
        body.append(f'<tr{label}><th scope="row">{first}</th>{inner}</tr>')
    # A reader must reach a region that scrolls with the keyboard.
    focus = f' tabindex="0" role="region" aria-label="{name} numbers"' if name else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll table"{focus}>{table}</div>'


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
