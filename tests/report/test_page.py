"""Tests of reports as an HTML page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.synthetic_reports import REPORTS, measured, parity, ported, wrong
from vit_ref.verify.precision import PRECISIONS
from vit_ref.verify.report import page, to_html, to_json
from vit_ref.verify.results import Behaviour, Cause

each_report = pytest.mark.parametrize("name", REPORTS)
CSS = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8")


class Panels:
    """The plot of one pass, read back from its SVG.

    Attributes:
      ticks: for each panel, the label beside each height: label -> y.
      columns: site -> its column.
      gate: the y of the semantic gate.
    """

    def __init__(self, html: str, section: int = 0):
        plots = re.findall(r'<svg class="axis".*?</svg><svg class="marks".*?</svg></div>', html, re.DOTALL)
        axis, marks = ElementTree.fromstring(f"<div>{plots[section]}")
        self.marks = marks
        labels = [(text.text, float(text.attrib["y"]) - 4) for text in axis]
        bottom = next(k for k, (label, _) in enumerate(labels) if label == "0")
        self.ticks = dict(labels[: bottom + 1]), dict(labels[bottom + 1 :])
        found = [column for column in marks.iter("svg") if column.find("title") is not None]
        self.columns = {column.findtext("title", "").partition(":")[0]: column for column in found}
        self.gate = next(middle(rect) for rect in marks.findall("rect") if rect.attrib["class"] == "gate")

    def heights(self, site: str, *kinds: str) -> list[float]:
        """Returns the y of a column's marks of these classes, in the order of the panels."""
        column = self.columns[site]
        return [y_of(mark) for mark in column if mark.attrib.get("class") in kinds]


def middle(rect: ElementTree.Element) -> float:
    return float(rect.attrib["y"]) + float(rect.attrib["height"]) / 2


def y_of(mark: ElementTree.Element) -> float:
    return middle(mark) if mark.tag == "rect" else float(mark.attrib["cy" if mark.tag == "circle" else "y"])


# Coordinates are written with one decimal.
def near(y: float) -> Any:
    return pytest.approx(y, abs=0.15)


def rows(html: str, name: str) -> dict[str, list[str]]:
    """Returns the cells of a pass's table by site."""
    found = re.findall(rf'<tr id="{name}-\d+">.*?</tr>', html)
    cells = [["".join(cell.itertext()) for cell in ElementTree.fromstring(row)] for row in found]
    return {first: rest for first, *rest in cells}


def one_site(**fields: Any) -> Panels:
    return Panels(to_html(ported(parity(measured("logits", **fields)))))


@each_report
def test_every_check_is_on_the_page_with_its_status(name) -> None:
    report = REPORTS[name]()
    html = to_html(report)
    found = {f"{kind}/{site}": cells[0] for kind in ("forward", "backward") for site, cells in rows(html, kind).items()}
    expected = {
        check.name: f"{page.SIGNS[check.status]} {check.status}"
        for check in report.checks
        if check.name != "backward/pixels" or report.backward
    }
    behaviour = {key: value for key, value in expected.items() if key.startswith("behaviour/")}
    assert found == {key: value for key, value in expected.items() if key not in behaviour}
    for key in behaviour:
        assert re.search(
            rf'<th scope="row">{key.partition("/")[2]}</th><td><span class="[\w-]+">{re.escape(expected[key])}<', html
        )
    for kind, section in (("forward", 0), ("backward", 1))[: 2 if report.backward else 1]:
        assert set(Panels(html, section).columns) == set(rows(html, kind))


@each_report
def test_the_page_loads_nothing_else(name) -> None:
    html = to_html(REPORTS[name]())
    for outside in ("http:", "https:", "//", "url(", "@import", "src=", "<script", "<link", "<img", "<iframe"):
        assert outside not in html, outside
    assert not re.search(r"<[^>]* on\w+=", html)


def numbers(document: Any) -> Iterator[str]:
    """Yields every number of a document as a page may write it, also those inside sentences."""
    if isinstance(document, dict | list):
        for value in document.values() if isinstance(document, dict) else document:
            yield from numbers(value)
    elif isinstance(document, float):
        yield from (f"{document:.1e}", f"{document:.0e}")
    elif isinstance(document, str):
        yield from re.findall(r"[\d.]+e[-+]\d+", document)


@each_report
def test_every_number_on_the_page_is_in_the_json(name) -> None:
    report = REPORTS[name]()
    outside_the_axes = re.sub(r'<style>.*</style>|<svg class="axis".*?</svg>', "", to_html(report), flags=re.DOTALL)
    shown = set(re.findall(r"[\d.]+e[-+]\d+", outside_the_axes))
    assert len(shown) >= 5
    assert shown <= set(numbers(to_json(report)))


def test_names_are_text_and_never_markup() -> None:
    evil = "<script>alert(1)</script>\"'&<b>"
    report = ported(
        parity(
            measured("logits", 1e-6, 1e-6),
            causes=(Cause(evil, "logits", 1e-6, 1e-16),),
            place=evil,
            hidden=(evil,),
            unmapped=(evil,),
            unobserved=(f"claimed {evil}",),
        ),
        title=evil,
        candidate=evil,
        environment={evil: evil, "device": evil},
        behaviour=(Behaviour("batch", 1.0, evil),),
        expected_failed_checks={f"{evil}*": evil, "logits": evil},
        not_backward=evil,
    )
    html = to_html(report)
    assert "<script" not in html
    assert "<b></b>" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;&lt;b&gt;") >= 14
    assert evil in Panels(html).columns


@pytest.mark.parametrize("power", [-16, -15, -13, -12, -11, -6])
def test_a_float64_error_is_drawn_at_its_height(power) -> None:
    panels = one_site(exact=10.0**power)
    y = panels.heights("logits", "ok", "bad")[0]
    # Between two decades whose heights are written beside them.
    (low, low_y), (high, high_y) = sorted(
        (int(label[2:]), height) for label, height in panels.ticks[0].items() if label.startswith("1e")
    )[:: len(panels.ticks[0]) - 3]
    assert y == near(low_y + (high_y - low_y) * (power - low) / (high - low))


def test_the_semantic_gate_is_at_its_value_and_splits_the_marks() -> None:
    assert one_site(exact=1e-12).heights("logits", "ok", "bad")[0] == near(one_site(exact=1e-12).gate)
    panels = one_site(exact=1e-12)
    assert panels.ticks[0]["1e-12"] == near(panels.gate)
    assert one_site(exact=1e-6).heights("logits", "bad")[0] < one_site(exact=1e-6).gate - 10
    assert one_site(exact=1e-15).heights("logits", "ok")[0] > one_site(exact=1e-15).gate + 10


def test_each_site_shows_its_own_gate_and_reference_error() -> None:
    sites = (
        measured("norm", rounding=4e-7, reference_error=1e-6, gate=4e-7),
        measured("logits", rounding=1e-6, gate=1e-7),
    )
    panels = Panels(to_html(ported(parity(*sites))))
    gate, mark = panels.heights("norm", "gate")[0], panels.heights("norm", "ok")[1]
    assert gate == near(mark)
    assert panels.heights("norm", "own")[0] == near(panels.ticks[1]["1e-6"])
    assert panels.heights("logits", "gate")[0] == near(panels.ticks[1]["1e-7"])
    assert panels.heights("logits", "bad")[0] == near(panels.ticks[1]["1e-6"])


@pytest.mark.parametrize(
    ("error", "label"),
    [(0.0, "0"), (1e-30, "0"), (math.inf, "∞"), (math.nan, "∞"), (1e30, "∞")],
)
def test_zero_and_infinity_are_drawn_beside_the_log_axis(error, label) -> None:
    panels = one_site(exact=error, rounding=error)
    marks = panels.heights("logits", "ok", "bad")
    assert marks == [near(panels.ticks[0][label]), near(panels.ticks[1][label])]
    for ticks in panels.ticks:
        decades = [y for name, y in ticks.items() if name.startswith("1e")]
        # Twelve pixels are the height of a label.
        assert ticks["∞"] + 12 <= min(decades)
        assert max(decades) + 12 <= ticks["0"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_report_of_each_precision_has_a_page(precision) -> None:
    page = to_html(ported(parity(measured("embeddings"), measured("logits"), precision=precision)))
    assert f"compared in float64 and {precision} with" in page


def test_all_heights_are_inside_the_plot() -> None:
    html = to_html(wrong())
    for section in (0, 1):
        panels = Panels(html, section)
        height = float(panels.marks.attrib["height"])
        ys = [y for site in panels.columns for y in panels.heights(site, "ok", "bad", "own", "alone")]
        assert min(ys) > 0
        assert max(ys) < height


@pytest.mark.parametrize(("name", "panel"), [("wrong", 0), ("rounding", 1)])
def test_blocks_alone_are_drawn_in_the_precision_they_ran_in(name, panel) -> None:
    report = REPORTS[name]()
    panels = Panels(to_html(report))
    bounds = panels.ticks[panel]
    for result in report.forward.results:
        drawn = panels.heights(result.site, "alone")
        assert len(drawn) == (result.alone is not None)
        assert all(bounds["∞"] <= y <= bounds["0"] for y in drawn)


def test_statuses_differ_in_shape() -> None:
    html = to_html(REPORTS["expected failures"]())
    panels = Panels(html)
    shapes = {
        site: {mark.tag for mark in column if mark.attrib.get("class") in ("ok", "bad", "expected")}
        for site, column in panels.columns.items()
    }
    assert shapes == {"embeddings": {"circle"}, "block.0.norm1": {"use", "circle"}, "logits": {"use", "circle"}}
    assert panels.heights("logits", "expected")
    assert not panels.heights("logits", "bad")
    assert len(set(page.SIGNS.values())) == len(page.SIGNS)


def test_sites_not_shown_are_grey_and_claimed_ones_marked() -> None:
    shown = Panels(to_html(REPORTS["output alone is shown"]()))
    assert len(shown.heights("patches", "hidden")) == 2
    assert not shown.heights("patches", "bad")
    claimed = Panels(to_html(REPORTS["no numbers"]()))
    assert claimed.heights("patches", "bad") == [near(claimed.ticks[0]["∞"])]


def test_the_first_divergence_is_marked_and_linked_to_its_row() -> None:
    html = to_html(wrong())
    link = re.search(r'<a href="#(forward-\d+)">([^<]*)</a>', html)
    assert link
    assert link[2] == "block.0.norm1"
    assert f'<tr id="{link[1]}"><th scope="row">block.0.norm1</th>' in html
    panels = Panels(html)
    (label,) = (text for text in panels.marks.iter("text") if text.attrib["class"].startswith("first"))
    assert label.text == "first divergence: block.0.norm1"
    column = panels.columns["block.0.norm1"]
    left, width = (float(column.attrib[key].rstrip("%")) for key in ("x", "width"))
    # Percentages have two decimals.
    assert float(label.attrib["x"].rstrip("%")) == pytest.approx(left + width / 2, abs=0.02)


def test_the_label_of_a_late_divergence_ends_at_its_line() -> None:
    sites = [measured(f"block.{i}.norm1") for i in range(4)]
    html = to_html(ported(parity(*sites, measured("logits", 1e-6))))
    assert '<text class="first end"' in html


def test_the_cause_is_above_the_plots_and_failed_tables_open() -> None:
    html = to_html(wrong())
    assert html.index("LayerNorm epsilon") < html.index('class="scroll plot"')
    assert html.count("<details open>") == 2
    assert "<details open>" not in to_html(REPORTS["right"]())


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("right", ["No gradients were compared: not requested.", "<title>passed: mine on tiny</title>"]),
        (
            "wrong",
            [
                "<title>failed: mine on tiny</title>",
                "image 1 of 4",
                "May begin earlier",
                "Next step</dt><dd>look for this cause in the candidate&#x27;s code that makes block.0.norm1",
            ],
        ),
        ("output alone is shown", ["Forward: 3 sites</h3><p>patches, embeddings, block.0.norm1</p>"]),
        ("expected failures", ["<code>block.*</code></th><td>1</td><td>0</td><td>known"]),
        ("no numbers", ["Claimed, not shown</dt><dd>patches", "inf"]),
        ("rounding", ["the formulas agree in float64; float32 relative RMS error"]),
        ("misbehaving", ["an input alone gives another output than in its batch"]),
    ],
)
def test_the_page_shows_the_findings(name, texts) -> None:
    html = re.sub(r"</?span[^>]*>", "", to_html(REPORTS[name]()))
    assert [each for each in texts if each not in html] == []


def test_cells_show_what_was_measured() -> None:
    html = to_html(ported(parity(measured("norm"), measured("logits", 3.1e-5, 4.2e-6, rounding=3.3e-5))))
    assert rows(html, "forward")["logits"] == [
        "✗ failed", "3.1e-05", "9.3e-05", "3.3e-05", "9.0e-08", "367", "3.0e-07", "0.00909", "4.2e-06",
    ]  # fmt: skip
    assert rows(html, "forward")["norm"][-1] == ""


def test_blocks_are_numbered_under_their_columns() -> None:
    panels = Panels(to_html(wrong(depth=3)), 1)
    numbered = [
        (text.text, float(text.attrib["x"].rstrip("%")))
        for text in panels.marks.iter("text")
        if text.attrib["class"].startswith("block")
    ]
    assert [text for text, _ in numbered] == ["2", "1", "0", "0", "1", "2"]
    middle = {
        site: float(column.attrib["x"].rstrip("%")) + float(column.attrib["width"].rstrip("%")) / 2
        for site, column in panels.columns.items()
    }
    # A block has thirteen sites, so the seventh is in the middle.
    assert numbered[0][1] == pytest.approx(middle["block.2.attn.out"], abs=0.02)


def test_a_page_of_12_blocks_that_all_fail_is_under_500_kb() -> None:
    report = wrong(depth=12)
    assert len(report.forward.results) == 160
    assert report.backward
    assert len(report.backward.results) == 361
    assert len(to_html(report).encode()) < 500_000


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme) -> None:
    block = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", block))

    def contrast(name: str, ground: str) -> float:
        dark, light = sorted((luminance(colours[name]), luminance(colours[ground])))
        return (light + 0.05) / (dark + 0.05)

    for ground in ("page", "card"):
        text = {name: contrast(name, ground) for name in ("text", "muted", "candidate", "pass", "fail", "warn")}
        assert min(text.values()) >= 4.5, (ground, text)  # for text
    assert contrast("own", "page") >= 3  # for graphics


def test_the_page_says_its_language_and_its_tables_their_headers() -> None:
    html = to_html(wrong())
    assert '<html lang="en">' in html
    # Two plots and two tables that scroll.
    assert html.count('tabindex="0" role="region" aria-label="') == 4
    assert len(re.findall("<th", html)) == len(re.findall(r'<th scope="(?:row|col)"|<thead', html))
    assert len(re.findall(r'<svg class="marks" role="img" aria-label="[^"]+First divergence: \w', html)) == 2


def test_errors_alone_are_a_column_even_if_no_block_is_blamed() -> None:
    """Rounding that only adds up leaves every part within its own gate."""
    results = measured("norm", alone=1e-7), measured("logits", rounding=4e-7, gate=3e-7, alone=1e-7)
    assert "alone, float32" in to_html(ported(parity(*results)))
    assert "alone, float32" not in to_html(
        ported(parity(measured("norm"), measured("logits", rounding=4e-7, gate=3e-7)))
    )


def test_an_error_beyond_rounding_is_said() -> None:
    report = ported(parity(measured("logits", alone=1e-3, rounding=1e-3), beyond="the bias is < 0 & added twice"))
    assert "Not explained by rounding" in to_html(report)
    assert "the bias is &lt; 0 &amp; added twice" in to_html(report)
    assert "Not explained by rounding" not in to_html(ported(parity(measured("logits"))))
