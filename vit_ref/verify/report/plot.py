"""Draws errors against their gates on a log axis: one SVG per pass, from its section of the JSON document.

Widths are in percent, so that the plot fits a telephone and keeps the size of its dots and letters. For the same
reason no line joins the marks. Each column is an SVG of its own, so a mark needs only its height.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import ml_dtypes

from vit_ref.verify.precision import PRECISIONS

# In pixels. A log axis has no room for infinity and zero: the first and the last `LANE` of a panel show them.
HEAD, TITLE, PANEL, LANE, FOOT = 16, 30, 200, 26, 40
TOPS = (HEAD + TITLE, HEAD + TITLE + PANEL + TITLE)
HEIGHT = TOPS[1] + PANEL + FOOT
# The axes end here whatever the errors are. Float64 itself rounds at 1e-16, and an error of a million says no more than
# one of a thousand.
LOWEST, HIGHEST = -17, 3
KINDS = {"site": "sites", "parameter": "parameters", "pixels": ""}


class Axis(NamedTuple):
    """The log axis of one panel.

    Attributes:
      top: the panel's upper edge in pixels.
      low: the power of ten at the lower end.
      high: the power of ten at the upper end.
    """

    top: int
    low: int
    high: int

    def y(self, value: float) -> float:
        """Returns the height of a value in pixels from above.

        Zero lies in the lane below the axis, and a value that is not finite in the lane above it.
        """
        if not value <= 10.0**self.high:
            return self.top + LANE / 3
        if value < 10.0**self.low:
            return self.top + PANEL - LANE / 3
        decades = (self.high - math.log10(value)) / (self.high - self.low)
        return self.top + LANE + decades * (PANEL - 2 * LANE)

    def decades(self) -> list[int]:
        """Returns the powers of ten to write beside the axis, at most seven. The gate 1e-12 is one if it is on it."""
        step = math.ceil((self.high - self.low) / 6)
        return [power for power in range(self.low, self.high + 1) if power % step == 0]


def axis(top: int, values: Iterable[float]) -> Axis:
    """Returns the axis that shows all values between `LOWEST` and `HIGHEST`.

    Args:
      top: the panel's upper edge in pixels.
      values: errors, of which at least one is positive and finite.
    """
    finite = [value for value in values if 0 < value < math.inf]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    return Axis(top, max(LOWEST, low), min(HIGHEST, high))


def plot(section: dict[str, Any], document: dict[str, Any], label: str) -> str:
    """Returns two panels as HTML: float64 errors with the semantic gate, and errors in the tested precision.

    Args:
      section: `document["forward"]` or `document["backward"]`.
      document: the report as JSON.
      label: the description that a screen reader reads out.
    """
    checks, precision = section["checks"], document["precision"]
    gate = document["gates"]["float64_rms"]
    epsilon = float(ml_dtypes.finfo(PRECISIONS[precision].dtype).eps)
    shown = [check["measured"] for check in checks if check["measured"]]
    rounded = [each for each in shown if each["gate"] is not None]
    alone = [float(each["alone"]["rms"]) for each in shown if each["alone"]]
    exact, rounding = (alone, []) if section["alone_precision"] == "float64" else ([], alone)
    axes = (
        axis(TOPS[0], [1e-16, 10 * gate, *exact, *(float(each["exact"]["rms"]) for each in shown)]),
        axis(
            TOPS[1],
            [epsilon / 10, 10 * epsilon, *rounding]
            + [float(each[key]) for each in rounded for key in ("rounding", "reference_error", "gate")],
        ),
    )
    width = 100 / len(checks)
    asked = "is it only rounding?" if rounded else "not measured, because the formula is wrong"
    titles = ("float64: is it the same formula?", f"{precision}: {asked}")
    first = next((k for k, check in enumerate(checks) if check["site"] == section["first_divergence"]), None)
    columns = [_column(k * width, width, check, section, document, axes) for k, check in enumerate(checks)]
    parts = [
        *_blocks(checks, width),
        *(_panel(each, title) for each, title in zip(axes, titles, strict=True)),
        # These come first, because their grey would cover the gate and half of the marks beside them.
        *(column for check, column in zip(checks, columns, strict=True) if not check["measured"]),
        *_gate_line(axes[0], gate),
        *(column for check, column in zip(checks, columns, strict=True) if check["measured"]),
        *(_first((k + 0.5) * width, checks[k]["site"]) for k in (first,) if k is not None),
    ]
    scale = "".join(_ticks(axes))
    return (
        f'<div class="scroll plot" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<svg class="axis" width="52" height="{HEIGHT}" aria-hidden="true">{scale}</svg>'
        f'<svg class="marks" role="img" aria-label="{escape(label)}" height="{HEIGHT}"'
        f' style="min-width:{2 * len(checks)}px">{"".join(parts)}</svg></div>'
    )


def _ticks(axes: Iterable[Axis]) -> Iterator[str]:
    for each in axes:
        for power in each.decades():
            yield f'<text x="46" y="{each.y(10.0**power) + 4:.1f}">1e{power}</text>'
        yield f'<text x="46" y="{each.y(math.inf) + 4:.1f}">∞</text><text x="46" y="{each.y(0) + 4:.1f}">0</text>'


def _panel(each: Axis, title: str) -> str:
    lines = [each.y(10.0**power) for power in each.decades()]
    grid = "".join(f'<rect class="grid" width="100%" height="1" y="{y:.1f}"/>' for y in lines)
    return f'<text class="title" y="{each.top - 9}">{title}</text>{grid}'


def _blocks(checks: list[dict[str, Any]], width: float) -> Iterator[str]:
    """Draws a band behind every other block, with the numbers and kinds below."""
    start = 0
    for kind, of_kind in groupby(checks, key=lambda check: check["kind"]):
        foot = HEIGHT - 6
        yield f'<text class="kind" x="{start * width:.2f}%" y="{foot}">{KINDS[kind]}</text>'
        for block, members in groupby(of_kind, key=lambda check: check["block"]):
            size = len(list(members))
            if block is not None:
                x, odd = start * width, "odd" if block % 2 else "even"
                yield (
                    f'<svg x="{x:.2f}%" width="{size * width:.2f}%">{_in_both(f"band {odd}")}</svg>'
                    f'<text class="block {odd}" x="{x + size * width / 2:.2f}%" y="{HEIGHT - 24}">{block}</text>'
                )
            start += size


def _in_both(kind: str) -> str:
    return "".join(f'<rect class="{kind}" width="100%" y="{top}" height="{PANEL}"/>' for top in TOPS)


def _gate_line(each: Axis, gate: float) -> Iterator[str]:
    y = each.y(gate)
    yield f'<rect class="gate" width="100%" height="1.5" y="{y - 0.75:.1f}"/>'
    yield f'<rect class="beyond" width="100%" height="{y - each.top:.1f}" y="{each.top}"/>'


def _first(x: float, site: str) -> str:
    end = " end" if x > 50 else ""
    return (
        f'<svg x="{x:.2f}%" class="first"><path d="M0 14V{HEIGHT - FOOT}"/></svg>'
        f'<text class="first{end}" x="{x:.2f}%" y="11">first divergence: {escape(site)}</text>'
    )


def _column(
    x: float, width: float, check: dict[str, Any], section: dict[str, Any], document: dict[str, Any], axes: Any
) -> str:
    exact, rounded = axes
    measured = check["measured"]
    opened = f'<svg x="{x:.2f}%" width="{width:.3f}%"><title>{escape(hover(check, section, document))}</title>'
    if measured is None:
        mark = _mark(exact.y(math.inf), False, "failed") if check["status"] == "failed" else ""
        return f"{opened}{_in_both('hidden')}{mark}</svg>"
    alone = ""
    if measured["alone"]:
        into = exact if section["alone_precision"] == "float64" else rounded
        alone = f'<circle class="alone" cx="50%" cy="{into.y(float(measured["alone"]["rms"])):.1f}" r="3"/>'
    formula = _mark(exact.y(float(measured["exact"]["rms"])), measured["passes_semantic_gate"], check["status"])
    if measured["gate"] is None:
        return f'{opened}<rect class="hit" width="100%" height="100%"/>{alone}{formula}</svg>'
    gate = rounded.y(float(measured["gate"]))
    return (
        f'{opened}<rect class="hit" width="100%" height="100%"/>'
        f'<rect class="beyond" width="100%" y="{rounded.top}" height="{gate - rounded.top:.1f}"/>'
        f'<rect class="gate" width="100%" y="{gate - 0.75:.1f}" height="1.5"/>'
        f'<circle class="own" cx="50%" cy="{rounded.y(float(measured["reference_error"])):.1f}" r="2"/>{alone}'
        f"{formula}"
        f"{_mark(rounded.y(float(measured['rounding'])), measured['passes_numerical_gate'], check['status'])}</svg>"
    )


def _mark(y: float, passes: bool, status: str) -> str:
    if passes:
        return f'<circle class="ok" cx="50%" cy="{y:.1f}" r="2.4"/>'
    kind = "expected" if status == "expected failure" else "bad"
    return f'<use class="{kind}" href="#diamond" x="50%" y="{y:.1f}"/>'


def hover(check: dict[str, Any], section: dict[str, Any], document: dict[str, Any]) -> str:
    """Returns the text under the pointer: the site with its numbers.

    Args:
      check: one check of the section.
      section: `document["forward"]` or `document["backward"]`.
      document: the report as JSON.
    """
    head = f"{check['site']}: {check['status']}"
    measured = check["measured"]
    if measured is None:
        return f"{head}\n{check['reason']}"
    alone = f"\nalone {figure(measured['alone']['rms'])} ({section['alone_precision']})" if measured["alone"] else ""
    rounding = (
        f"{figure(measured['rounding'])}, gate {figure(measured['gate'])},"
        f" {document['reference']} {figure(measured['reference_error'])}"
        if measured["gate"] is not None
        else "not measured"
    )
    return (
        f"{head}\nfloat64 {figure(measured['exact']['rms'])}, gate {figure(measured['semantic_gate'])}\n"
        f"{document['precision']} {rounding}{alone}"
    )


def figure(value: float | str) -> str:
    """Returns an error as all reports write it, with one decimal."""
    return f"{float(value):.1e}" if value else "0"
