"""The report on a terminal."""

from __future__ import annotations

import math
import re

import pytest

from tests.helpers.synthetic_reports import REPORTS, measured, parity, ported, wrong
from vit_ref.verify.gates import Error
from vit_ref.verify.report import headline, summary, table, to_html, to_json
from vit_ref.verify.report.text import MARKS, wrong_alone
from vit_ref.verify.results import Cause, ParityReport, SiteResult


@pytest.mark.parametrize("name", REPORTS)
def test_a_summary_has_the_divergence_on_top_the_verdict_last_and_80_columns(name) -> None:
    report = REPORTS[name]()
    lines = summary(report).splitlines()
    # The headline may be broken in lines, but loses no word.
    assert " ".join(summary(report).split()).startswith(" ".join(headline(report.forward).split()))
    assert max(map(len, lines)) <= 80
    assert lines[-1] == f"{'PASSED' if report.passed else 'FAILED'}: mine on tiny against FlaxViT, float32"


def test_a_summary_says_where_a_port_goes_wrong_and_why_before_anything_else() -> None:
    lines = summary(wrong()).splitlines()
    assert lines[0] == "tiny: first divergence at block.0.norm1: float64 relative RMS 5.6e-07, gate"
    assert "  likely cause: LayerNorm epsilon 1e-06: with it the error at block.0.norm1" in lines
    assert "tiny: first divergence at norm: float64 relative RMS 3.3e-05, gate 1e-12; worst" in lines
    assert lines[-2] == "checks: 5 passed, 98 failed"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("right", ["not observed: gradients (not asked for)"]),
        ("wrong", []),
        ("output alone is shown", ["not observed: 3 sites, gradients (not asked for)"]),
        (
            "expected failures",
            [
                "expected failure: block.*: known: 1: forward/block.0.norm1",
                "stale expectation: embeddings: was wrong once: 1: forward/embeddings",
                "expected failure: l*: known: 1: forward/logits",
            ],
        ),
        (
            "misbehaving",
            ["failed: behaviour/batch: an image alone comes out otherwise than in its batch"],
        ),
    ],
)
def test_every_status_has_lines_of_its_own_that_begin_with_it(name, lines) -> None:
    found = summary(REPORTS[name]()).splitlines()
    assert [line for line in found if line in lines] == lines
    begun = ("failed: ", "not observed: ", "expected failure: ", "stale expectation: ")
    assert {line for line in found if line.startswith(begun)} <= {*lines, "not observed: gradients (not asked for)"}


def test_a_row_of_the_table_that_fails_ends_with_its_mark_and_no_other_does() -> None:
    both, exact, rounding = MARKS
    rows = table(
        parity(
            measured("patches"),
            measured("norm", 1e-6),
            measured("pooler", rounding=1e-3),
            measured("logits", 1e-6, rounding=1e-3),
        )
    ).splitlines()[1:]
    assert [row.split()[-1] for row in rows[1:]] == [exact, rounding, both]
    assert rows[0].split()[-1] not in MARKS


def test_an_expectation_that_excuses_everything_makes_a_report_pass() -> None:
    report = ported(parity(measured("norm", 1e-6), measured("logits")), expected_failed_checks={"norm": "known"})
    assert summary(report).splitlines()[-1].startswith("PASSED: ")


def test_what_was_not_observed_does_not_hide_what_is_wrong() -> None:
    wrong = parity(measured("norm"), measured("logits", 1e-3), unobserved=("patches", "embeddings"))
    first, second, *_ = headline(wrong).splitlines()
    assert first.startswith("tiny: 2 sites not observed, first patches: not called, or under a transformation")
    assert second.startswith("tiny: first divergence at logits: float64 relative RMS 1.0e-03")
    assert len(headline(parity(measured("logits"), unobserved=("patches",))).splitlines()) == 1


def test_a_report_of_nothing_has_a_table_without_rows() -> None:
    assert table(parity(unobserved=("logits",))).startswith("sites ")


def test_of_what_is_not_shown_parameters_come_first() -> None:
    unmapped = (
        "block.0.norm1",
        "norm",
        "position_embeddings",
        "patches",
        "blocks.0.norm1.scale",
        "head.bias",
        "pixels",
    )
    said = headline(parity(measured("logits"), unmapped=unmapped))
    assert "not observed: 7 sites: position_embeddings, blocks.0.norm1.scale, head.bias, ..." in said


def blamed(*results: SiteResult) -> str:
    (line,) = (line for line in headline(parity(*results)).splitlines() if "wrong by itself" in line)
    return line.partition("wrong by itself: ")[2]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"block.0.mlp.hidden": 2e-4}, "block.0 from mlp.hidden on 2.0e-04"),
        (
            {f"block.{i}.mlp.hidden": (i + 1) * 1e-4 for i in range(12)} | {"norm": 5e-7, "logits": 4e-7},
            "12 blocks, 0 to 11, from mlp.hidden on 1.2e-03; norm 5.0e-07",
        ),
        (
            {"block.1.norm1": 1e-6, "block.1.attn.query": 1e-3, "block.2.norm2": 1e-6, "block.4.norm1": 1e-5},
            "2 blocks, 1, 4, from norm1 on 1.0e-03; block.2 from norm2 on 1.0e-06",
        ),
        ({"norm": 5e-7, "logits": 1e-1}, "norm 5.0e-07; logits 1.0e-01"),
    ],
)
def test_every_part_that_is_wrong_in_its_own_way_is_named(wrong: dict[str, float], said: str) -> None:
    right = [measured(f"block.{i}.attn.key", alone=1e-16) for i in range(5)]
    assert blamed(*right, *(measured(site, rms, alone=rms) for site, rms in wrong.items())) == said


def test_rounding_is_told_from_a_wrong_formula_and_what_lies_behind_it_is_named() -> None:
    rounding = Cause("rounded to float32", "patches", 2e-8, 0.0, "float32")
    tanh = Cause("tanh GELU", "block.0.mlp.hidden", 1.9e-4, 1e-7)
    sites = measured("patches", 2e-8), measured("block.0.mlp.hidden", 1.9e-4)
    said = headline(parity(*sites, causes=(rounding, tanh), beyond="block.0.mlp.hidden by 1.9e-04")).splitlines()
    assert "  rounding is no wrong formula: compute in the dtype that load(checkpoint, dtype) is told" in said
    assert "  this rounding does not explain what follows: block.0.mlp.hidden by 1.9e-04" in said
    assert "rounding is no" not in headline(parity(*sites, causes=(tanh,)))
    assert "explain" not in headline(parity(*sites, causes=(rounding,)))


def test_notes_on_how_a_port_was_run_are_in_the_summary() -> None:
    report = ported(parity(measured("logits")), notes=("casts were undone",))
    assert "note: casts were undone" in summary(report).splitlines()


def test_one_is_no_plural() -> None:
    assert "tiny: 1 site pass; " in headline(parity(measured("logits")))
    assert "tiny: 2 sites pass; " in headline(parity(measured("norm"), measured("logits")))


def test_blamed_are_those_beyond_their_gate_and_not_what_was_fed_their_fault() -> None:
    """Nobody can feed the embeddings the reference's patches."""
    exact = [measured(name, 1e-3, alone=1e-3) for name in ("patches", "embeddings", "logits")]
    assert list(wrong_alone(parity(*exact))) == ["patches", "logits"]
    assert list(wrong_alone(parity(*exact[1:]))) == ["embeddings", "logits"]
    right = measured("norm", alone=1e-7, rounding=1e-7, gate=2e-7)
    rounded = measured("logits", alone=8e-7, rounding=9e-7, gate=2e-7)
    assert list(wrong_alone(parity(right, rounded))) == ["logits"]


def incomparable(reason: str, *, exactly: bool) -> ParityReport:
    """A pass whose output cannot be compared, in float64 too or in the tested precision alone."""
    right = measured("norm")
    beyond = {"rounding": math.inf, "incomparable": reason}
    if not exactly:
        return parity(right, measured("logits", **beyond))
    exact = Error(math.inf, math.inf, reason=reason)
    return parity(right, measured("logits", **beyond)._replace(exact=exact, alone=exact))


@pytest.mark.parametrize("reason", ["wrong shape (2, 5), not (2, 7)", "not finite"])
@pytest.mark.parametrize(("exactly", "where"), [(True, "float64"), (False, "float32")])
def test_what_cannot_be_compared_is_named_and_no_number(reason: str, exactly: bool, where: str) -> None:
    report = incomparable(reason, exactly=exactly)
    first, output, *_ = headline(report).splitlines()
    assert f"first divergence at logits: {reason} in {where}" in first
    assert output == f"  logits: {reason} in {where}"
    assert "inf" not in headline(report).replace("not finite", "")
    check = next(check for check in ported(report).checks if check.status == "failed")
    assert (check.name, check.reason) == ("forward/logits", f"{reason} in {where}")
    document = to_json(ported(report))
    (failed,) = (each for each in document["forward"]["checks"] if each["status"] == "failed")
    assert (failed["reason"], failed["measured"]["incomparable"]) == (check.reason, check.reason)
    page = to_html(ported(report))
    assert f"<dt>Error there</dt><dd>{check.reason}</dd>" in page
    assert f"<dt>Output</dt><dd>{check.reason}</dd>" in page


def test_one_element_that_is_wrong_is_told_by_the_maximum_everywhere() -> None:
    result = measured("logits")._replace(exact=Error(1e-13, 3e-11))
    report, said = ported(parity(result)), "float64 relative maximum 3.0e-11, gate 1e-11"
    assert f"first divergence at logits: {said}; worst" in headline(report.forward)
    assert next(check.reason for check in report.checks if check.status == "failed") == said
    assert f"<dt>Error there</dt><dd>{said}</dd>" in re.sub("</?span.*?>", "", to_html(report))


def test_a_failure_by_little_is_told_from_its_gate_everywhere() -> None:
    report = ported(parity(measured("norm"), measured("logits", rounding=1.9004e-6, gate=1.9e-6)))
    said = "float32 relative RMS 1.9004e-06, gate 1.9000e-06"
    assert said in headline(report.forward)
    assert said in next(check.reason for check in report.checks if check.status == "failed")
    page = to_html(report)
    assert re.sub("<.*?>", "", page).count(said) == 1
    assert "<td>1.9004e-06</td>" in page and "<td>1.9000e-06</td>" in page
    # 1.9 over 1.9004 is no 1.
    assert "<td>0.9998</td>" in page and "0.9998 at logits" in re.sub("<.*?>", "", page)
    assert table(report.forward).splitlines()[-1].split()[-2:] == ["0.9998", "rounding"]
