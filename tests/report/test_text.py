"""Tests of reports as text on a terminal."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from tests.helpers.synthetic_reports import REPORTS, measured, parity, ported, wrong
from vit_ref.verify.gates import Error
from vit_ref.verify.report import closing, headline, in_full, sections, summary, table, to_html, to_json
from vit_ref.verify.report.text import MARKS, next_step, wrong_alone
from vit_ref.verify.results import Cause, ParityReport, SiteResult


@pytest.mark.parametrize("name", REPORTS)
def test_a_summary_begins_with_the_divergence_in_80_columns(name) -> None:
    report = REPORTS[name]()
    lines = summary(report).splitlines()
    # The headline may be broken in lines, but loses no word.
    assert " ".join(summary(report).split()).startswith(" ".join(headline(report.forward).split()))
    assert max(map(len, lines)) <= 80
    assert lines[-1] == f"{'PASSED' if report.passed else 'FAILED'}: mine on {report.title} against FlaxViT, float32"


def test_a_summary_names_site_cause_and_next_step_first() -> None:
    lines = summary(wrong()).splitlines()
    assert lines[0] == "tiny: first divergence at block.0.norm1: float64 relative RMS error 5.6e-07,"
    assert lines[2] == "  likely cause: LayerNorm epsilon 1e-06: the same bug in the oracle lowers the"
    assert lines[4] == "  next step: look for this cause in the candidate's code that makes"
    assert lines[5].strip() == "block.0.norm1"
    assert "tiny: first divergence at norm: float64 relative RMS error 3.3e-05, gate 1e-12;" in lines
    assert sum(line.startswith("  next step: ") for line in lines) == 1
    assert lines[-2] == "checks: 5 passed, 98 failed"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("right", ["not observed: gradients (not requested)"]),
        ("wrong", []),
        ("output alone is shown", ["not observed: 3 sites, gradients (not requested)"]),
        (
            "expected failures",
            [
                "expected failure: block.*: known: 1 check: forward/block.0.norm1",
                "stale expectation: embeddings: was wrong once: 1 check: forward/embeddings:",
                "expected failure: l*: known: 1 check: forward/logits",
            ],
        ),
        (
            "stopped at a wrong formula",
            [
                "not observed: float32 rounding (not run: the formula is wrong in float64),",
            ],
        ),
        (
            "misbehaving",
            ["failed: behaviour/batch: an input alone gives another output than in its batch"],
        ),
    ],
)
def test_every_status_has_lines_of_its_own_that_begin_with_it(name, lines) -> None:
    found = summary(REPORTS[name]()).splitlines()
    assert [line for line in found if line in lines] == lines
    begun = ("failed: ", "not observed: ", "expected failure: ", "stale expectation: ")
    assert {line for line in found if line.startswith(begun)} <= {*lines, "not observed: gradients (not requested)"}


def test_rounding_that_was_not_measured_is_no_number_anywhere() -> None:
    report = REPORTS["stopped at a wrong formula"]()
    assert "logits: float64 error 1.0e-06; float32 rounding not measured" in summary(report)
    rows = [line.split() for line in table(report.forward).splitlines()[1:]]
    assert [row[0] for row in rows if row[-1] == "float64"] == ["norm", "logits"]
    assert all(row.count("-") == 4 for row in rows)
    assert "nan" not in " ".join([summary(report), table(report.forward), to_html(report)]).lower()
    numbers = [check["measured"] for check in to_json(report)["forward"]["checks"]]
    assert {each[key] for each in numbers for key in ("rounding", "reference_error", "gate", "ratio", "margin")} == {
        None
    }
    assert all(check.margin is None and check.rounding is None for check in report.checks)


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_report_in_parts_has_the_lines_of_the_whole_in_the_same_order(name, whole) -> None:
    report = REPORTS[name]()
    parts = sections(report, whole=whole)
    assert len(parts) == 1 + (report.backward is not None)
    assert "\n".join([*parts, closing(report)]) == (in_full if whole else summary)(report)
    # What is printed of the forward pass does not change when the gradients are known.
    assert sections(dataclasses.replace(report, backward=None), whole=whole) == parts[:1]


def test_only_failing_rows_of_the_table_end_with_a_mark() -> None:
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


def test_a_report_passes_if_every_failure_is_expected() -> None:
    report = ported(parity(measured("norm", 1e-6), measured("logits")), expected_failed_checks={"norm": "known"})
    assert summary(report).splitlines()[-1].startswith("PASSED: ")


def test_sites_not_shown_do_not_hide_a_divergence() -> None:
    wrong = parity(measured("norm"), measured("logits", 1e-3), unobserved=("patches", "embeddings"))
    first, second, *_ = headline(wrong).splitlines()
    assert first.startswith("tiny: 2 claimed sites not shown, first patches: not called, or inside the candidate's")
    assert second.startswith("tiny: first divergence at logits: float64 relative RMS error 1.0e-03")
    unshown, step = headline(parity(measured("logits"), unobserved=("patches",))).splitlines()
    assert unshown.startswith("tiny: 1 claimed site not shown, first patches: ")
    assert step == "  next step: show them through a tap, or remove them from the candidate's sites"


def test_a_report_of_nothing_has_a_table_without_rows() -> None:
    assert table(parity(unobserved=("logits",))).startswith("sites ")


def test_parameters_come_first_among_values_not_observed() -> None:
    unmapped = (
        "block.0.norm1",
        "norm",
        "position_embeddings",
        "patches",
        "blocks.0.norm1.scale",
        "head.bias",
        "pixels",
    )
    text = headline(parity(measured("logits"), unmapped=unmapped))
    assert "not observed: 7 sites: position_embeddings, blocks.0.norm1.scale, head.bias, ..." in text


def blamed(*results: SiteResult) -> str:
    (line,) = (line for line in headline(parity(*results)).splitlines() if "reference's input" in line)
    return line.partition("wrong even with the reference's input: ")[2]


@pytest.mark.parametrize(
    ("wrong", "entry"),
    [
        ({"block.0.mlp.hidden": 2e-4}, "block.0 from mlp.hidden on (2.0e-04)"),
        (
            {f"block.{i}.mlp.hidden": (i + 1) * 1e-4 for i in range(12)} | {"norm": 5e-7, "logits": 4e-7},
            "blocks 0 to 11 from mlp.hidden on (1.2e-03); norm (5.0e-07)",
        ),
        (
            {"block.1.norm1": 1e-6, "block.1.attn.query": 1e-3, "block.2.norm2": 1e-6, "block.4.norm1": 1e-5},
            "blocks 1, 4 from norm1 on (1.0e-03); block.2 from norm2 on (1.0e-06)",
        ),
        ({"norm": 5e-7, "logits": 1e-1}, "norm (5.0e-07); logits (1.0e-01)"),
    ],
)
def test_every_part_wrong_by_itself_is_named(wrong: dict[str, float], entry: str) -> None:
    right = [measured(f"block.{i}.attn.key", alone=1e-16) for i in range(5)]
    assert blamed(*right, *(measured(site, rms, alone=rms) for site, rms in wrong.items())) == entry


def test_wrong_parts_that_could_not_be_fed_are_named() -> None:
    sites = ["block.0.norm1", "block.1.norm1", "block.2.norm1", "norm", "logits"]
    alone = {"block.1.norm1": 1e-3, "logits": 1e-16}
    report = parity(*(measured(site, 1e-3, alone=alone.get(site)) for site in sites))
    assert "  the reference's input could not be fed to parts that differ: blocks 0, 2, norm" in headline(report)
    assert to_json(ported(report))["forward"]["not_fed"] == ["block.0", "block.2", "norm"]
    assert "<dt>Input not replaced</dt><dd>block.0, block.2, norm: differs, and" in to_html(ported(report))
    everywhere = dataclasses.replace(report, everywhere=True)
    line = "the reference's values could not be fed before sites that differ: block.0.norm1, block.2.norm1, norm"
    assert f"  {line}\n" in headline(everywhere)
    none = {"block.1.norm1": 1e-16, "logits": 1e-16}
    inherited = parity(*(measured(site, 1e-3, alone=none.get(site)) for site in sites))
    assert "wrong even" not in headline(inherited)
    assert "could not be fed to parts that differ: blocks 0, 2, norm" in headline(inherited)
    assert "Input not replaced" in to_html(ported(inherited))
    right = parity(measured("block.0.norm1"), *(measured(site, 1e-3, alone=1e-3) for site in sites[1:]))
    assert "could not be fed" not in headline(right) and not to_json(ported(right))["forward"]["not_fed"]


def test_rounding_is_not_called_a_wrong_formula() -> None:
    rounding = Cause("rounded to float32", "patches", 2e-8, 0.0, "float32")
    tanh = Cause("tanh GELU", "block.0.mlp.hidden", 1.9e-4, 1e-7)
    sites = measured("patches", 2e-8), measured("block.0.mlp.hidden", 1.9e-4)
    lines = headline(
        parity(*sites, causes=(rounding, tanh), beyond="block.0.mlp.hidden, relative RMS error 1.9e-04")
    ).splitlines()
    assert any(line.startswith("  next step: this is rounding, not a wrong formula: ") for line in lines)
    assert "  rounding does not explain a later divergence: block.0.mlp.hidden, relative RMS error 1.9e-04" in lines
    assert "this is rounding" not in headline(parity(*sites, causes=(tanh,)))
    assert "explain" not in headline(parity(*sites, causes=(rounding,)))


@pytest.mark.parametrize(
    ("report", "step"),
    [
        (parity(measured("norm", 1e-3)), "compare the candidate's code at norm with the reference's"),
        (parity(measured("norm", 1e-3), hidden=("embeddings",)), "add embeddings to the candidate's sites"),
        (parity(measured("norm", rounding=1e-3)), "look for a cast, a dtype or a matrix product below float32 at norm"),
        (parity(measured("norm", 1e-3), what="gradients"), "correct the forward pass first if it fails; else look for"),
        (parity(measured("norm")), ""),
    ],
)
def test_each_kind_of_failure_has_its_next_step(report: ParityReport, step: str) -> None:
    assert next_step(report).startswith(step)
    assert ("next step: " in headline(report)) is bool(step)


def test_notes_on_the_run_of_a_candidate_are_in_the_summary() -> None:
    report = ported(parity(measured("logits")), notes=("casts were undone",))
    assert "note: casts were undone" in summary(report).splitlines()


def test_a_count_of_one_is_singular() -> None:
    assert "tiny: 1 site passes: " in headline(parity(measured("logits")))
    assert "tiny: 2 sites pass: " in headline(parity(measured("norm"), measured("logits")))


def test_a_part_fed_another_parts_fault_is_not_blamed() -> None:
    """The embeddings cannot be fed the reference's patches."""
    exact = [measured(name, 1e-3, alone=1e-3) for name in ("patches", "embeddings", "logits")]
    assert list(wrong_alone(parity(*exact))) == ["patches", "logits"]
    assert list(wrong_alone(parity(*exact[1:]))) == ["embeddings", "logits"]
    right = measured("norm", alone=1e-7, rounding=1e-7, gate=2e-7)
    rounded = measured("logits", alone=8e-7, rounding=9e-7, gate=2e-7)
    assert list(wrong_alone(parity(right, rounded))) == ["logits"]


def incomparable(reason: str, *, exactly: bool) -> ParityReport:
    """Returns a pass whose output cannot be compared, in float64 too or only in the tested precision."""
    right = measured("norm")
    beyond = {"rounding": math.inf, "incomparable": reason}
    if not exactly:
        return parity(right, measured("logits", **beyond))
    exact = Error(math.inf, math.inf, reason=reason)
    return parity(right, measured("logits", **beyond)._replace(exact=exact, alone=exact))


@pytest.mark.parametrize("reason", ["wrong shape (2, 5), not (2, 7)", "not finite"])
@pytest.mark.parametrize(("exactly", "where"), [(True, "float64"), (False, "float32")])
def test_a_value_not_comparable_has_a_reason_and_no_number(reason: str, exactly: bool, where: str) -> None:
    report = incomparable(reason, exactly=exactly)
    first, *lines = headline(report).splitlines()
    assert first.endswith(f"first divergence at logits: {reason} in {where}")
    assert f"  logits: {reason} in {where}" in lines
    assert "inf" not in headline(report).replace("not finite", "")
    check = next(check for check in ported(report).checks if check.status == "failed")
    assert (check.name, check.reason) == ("forward/logits", f"{reason} in {where}")
    document = to_json(ported(report))
    (failed,) = (each for each in document["forward"]["checks"] if each["status"] == "failed")
    assert (failed["reason"], failed["measured"]["incomparable"]) == (check.reason, check.reason)
    page = to_html(ported(report))
    assert f"<dt>Error</dt><dd>{check.reason}</dd>" in page
    assert f"<dt>Output</dt><dd>{check.reason}</dd>" in page


def test_a_value_not_comparable_after_the_first_divergence_is_named_with_its_reason() -> None:
    last = measured("logits")._replace(exact=Error(math.inf, math.inf, reason="wrong shape (4, 7), not (4, 10)"))
    first = headline(parity(measured("norm", 1e-3), last)).splitlines()[0]
    assert first.endswith("1.0e-03, gate 1e-12; worst at logits: wrong shape (4, 7), not (4, 10)")


def test_one_wrong_element_is_reported_by_its_maximum() -> None:
    result = measured("logits")._replace(exact=Error(1e-13, 3e-11))
    report, reason = ported(parity(result)), "float64 relative maximum error 3.0e-11, gate 1e-11"
    assert f"first divergence at logits: {reason}; worst" in headline(report.forward)
    assert next(check.reason for check in report.checks if check.status == "failed") == reason
    assert f"<dt>Error</dt><dd>{reason}</dd>" in re.sub("</?span.*?>", "", to_html(report))


def test_a_narrow_failure_reads_differently_from_its_gate() -> None:
    report = ported(parity(measured("norm"), measured("logits", rounding=1.9004e-6, gate=1.9e-6)))
    reason = "float32 relative RMS error 1.9004e-06, gate 1.9000e-06"
    assert reason in headline(report.forward)
    assert reason in next(check.reason for check in report.checks if check.status == "failed")
    page = to_html(report)
    assert re.sub("<.*?>", "", page).count(reason) == 1
    assert "<td>1.9004e-06</td>" in page and "<td>1.9000e-06</td>" in page
    # 1.9 over 1.9004 is not 1.
    assert "<td>0.9998</td>" in page and "0.9998 at logits" in re.sub("<.*?>", "", page)
    assert table(report.forward).splitlines()[-1].split()[-2:] == ["0.9998", "rounding"]


def blamed_sites(sites: list[str]) -> str:
    """Returns the line that names the sites, if all of them are wrong alone."""
    off = Error(0.1, 0.1)
    results = [measured(site)._replace(exact=off, alone=off) for site in sites]
    lines = headline(dataclasses.replace(parity(*results), everywhere=True)).splitlines()
    (line,) = [line.strip() for line in lines if line.strip().startswith("wrong even")]
    return line.removeprefix("wrong even with the reference's values before it: ")


def test_sites_that_are_wrong_alone_are_put_together_by_their_numbers() -> None:
    few = [f"down_{i}.conv_{k}.{place}" for i in range(2) for k in range(2) for place in "ab"]
    assert blamed_sites([*few[:4], "up.0.mlp", "up.1.mlp"]).endswith(
        "down_0.conv_1.b (1.0e-01); up.{i}.mlp, 2 times (1.0e-01)"
    )
    assert blamed_sites([*few, "last"]) == "; ".join(
        ["down_{i}.conv_{i}.a, 4 times (1.0e-01)", "down_{i}.conv_{i}.b, 4 times (1.0e-01)", "last (1.0e-01)"]
    )


def test_nearby_inputs_are_told() -> None:
    results = [measured("block.0.norm1")]
    said = "rounding of the given inputs and 7 nearby ones"
    for forward in (parity(*results, nearby=7), parity(results[0]._replace(rounding=1.0), nearby=7)):
        assert said in headline(forward)
        assert to_json(ported(forward))["forward"]["nearby_inputs"] == 7
        assert "Rounding is that of the given inputs and 7 nearby ones." in to_html(ported(forward))
    alone = parity(*results)
    assert "nearby" not in headline(alone) and "nearby" not in to_html(ported(alone))


def test_a_wider_semantic_gate_is_told() -> None:
    usual, ill = measured("norm", 9e-13), measured("cls_token")._replace(exact=Error(1.4e-8, 2e-8, noise=1.1e-7))
    assert ": largest float64 error 9.0e-13 at norm, smallest" in headline(parity(usual))
    for report in (parity(usual, ill), parity(ill)):
        assert ": largest float64 error 1.4e-08 at cls_token (gate 1.1e-07 there), smallest" in headline(report)
        assert '</span> at cls_token, gate <span class="n">1.1e-07</span></dd>' in to_html(ported(report))
    wrong = ill._replace(exact=ill.exact._replace(rms=2e-7))
    assert "first divergence at cls_token: float64 relative RMS error 2.0e-07, gate 1.1e-07" in headline(parity(wrong))
    assert "float64 1.4e-08, gate 1.1e-07" in to_html(ported(parity(ill)))


def test_a_site_of_the_table_that_is_never_called_is_to_be_shown() -> None:
    fields = {"hidden": ("block.0.norm1",), "unobserved": ("block.0.norm1",)}
    step = next_step(parity(measured("norm", 1e-3), **fields))
    assert step.startswith("show block.0.norm1, to find where the fault begins: the candidate's sites name it")
    # One that the table does not name is to be added.
    assert next_step(parity(measured("norm", 1e-3), hidden=("block.0.norm1",))).startswith("add block.0.norm1 to the")
