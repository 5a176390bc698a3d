"""Does the first verdict come before the rest, can a failure end the run, and can a cut be verified?"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import vit_ref
from vit_ref.cli.commands import main
from vit_ref.errors import CandidateError, InputError, UndifferentiableError
from vit_ref.verify import session
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.compare.first_look import FirstLook, describe_divergence
from vit_ref.verify.report import SCHEMA, in_full, sections, summary, to_html, to_json
from vit_ref.verify.results import CandidateReport, ParityReport
from vit_ref.weights.writing import write_json

WORKED = Path(__file__).parent / "worked"
TANH = f"{WORKED / 'nnx_tutorial.py'}:wrong_gelu"
RIGHT = str(WORKED / "nnx_tutorial.py")
STOPPED = "not run: the forward comparison failed, and fail-fast ends the run there"
DEEP = Case(
    "three-blocks",
    dataclasses.replace(CASES["deep"].config, num_hidden_layers=3, num_channels=3, image_size=30),
    seed=31,
)
# It reads neither the depth nor the number of positions from the checkpoint.
FIXED = """
import dataclasses
import json

import vit_ref


def load(checkpoint, dtype):
    config = vit_ref.ViTConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    config = dataclasses.replace(config, num_hidden_layers=3, image_size=30)
    return vit_ref.from_pretrained(checkpoint, config=config, dtype=dtype)


candidate = vit_ref.Candidate(load=load)
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three blocks with a grid of six by six."""
    return DEEP.write(tmp_path_factory.mktemp("given") / "deep").path


def steps_of(run: Callable[..., CandidateReport], *arguments: Any, **options: Any) -> tuple[CandidateReport, list[str]]:
    steps: list[str] = []
    return run(*arguments, progress=steps.append, **options), steps


@pytest.mark.parametrize("whole", [False, True])
def test_the_forward_verdict_is_printed_before_the_gradients_begin(
    whole: bool, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed: list[str] = []

    def late(*arguments: Any, **options: Any) -> ParityReport:
        printed.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]  # what was flushed
        raise UndifferentiableError("it has no gradients")

    reports: list[CandidateReport] = []
    check = session.check_port
    monkeypatch.setattr(session, "compare_backward", late)
    monkeypatch.setattr(
        session, "check_port", lambda *given, **asked: reports.append(check(*given, **asked)) or reports[-1]
    )
    options = ["--table"] if whole else []
    ended = CliRunner().invoke(main, ["verify", str(saved("one-block")), *options, "--json", str(tmp_path / "a.json")])
    assert ended.exit_code == 0, ended.output
    assert printed == [sections(reports[0], whole=whole)[0] + "\n"]
    assert ended.stdout == (in_full if whole else summary)(reports[0]) + "\n"
    assert json.loads((tmp_path / "a.json").read_text()) == to_json(reports[0])


def test_each_part_of_a_right_candidate_is_handed_over_though_it_would_fail_fast(saved: Callable[[str], Path]) -> None:
    parts: list[CandidateReport] = []
    report = vit_ref.check_port(RIGHT, saved("one-block"), fail_fast=True, on_part=parts.append)
    assert [part.passed for part in parts] == [True, True]
    assert [part.backward for part in parts] == [None, report.backward]
    assert [part.not_backward for part in parts] == ["not run yet", ""]
    assert [(part.forward, part.behaviour, part.not_behaviour) for part in parts] == [
        (report.forward, (), "not run yet")
    ] * 2
    assert report.passed and report.backward is not None and report.behaviour and not report.not_behaviour


def test_a_wrong_formula_ends_a_run_that_fails_fast(saved: Callable[[str], Path]) -> None:
    parts: list[CandidateReport] = []
    report, steps = steps_of(vit_ref.check_port, TANH, saved("one-block"), fail_fast=True, on_part=parts.append)
    assert not report.passed and not parts
    assert (report.forward.semantic_failures[0].site, report.forward.causes[0].label) == (
        "block.0.mlp.hidden",
        "tanh GELU",
    )
    assert (report.backward, report.not_backward, report.behaviour, report.not_behaviour) == (
        None,
        STOPPED,
        (),
        STOPPED,
    )
    assert not report.forward.has_rounding and not report.forward.numerical_failures
    assert not [step for step in steps if "float32" in step or "gradients" in step or "alone, compiled" in step]
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(to_json(report))
    assert "not measured, because the formula is wrong" in to_html(report)
    # The whole run finds the same in float64.
    whole = vit_ref.check_port(TANH, saved("one-block"), backward=False)
    assert [(r.site, r.exact, r.alone) for r in whole.forward.results] == [
        (r.site, r.exact, r.alone) for r in report.forward.results
    ]


DIVERGES = "nnx_tutorial-wrong_gelu: first divergence at block.0.mlp.hidden: float64 relative RMS error "


def told(candidate: str, checkpoint: Path, **options: Any) -> tuple[list[str], CandidateReport]:
    """Returns steps and lines about a divergence in the order in which they came."""
    events: list[str] = []
    report = vit_ref.check_port(
        candidate,
        checkpoint,
        backward=False,
        fail_fast=True,
        on_divergence=events.append,
        progress=events.append,
        **options,
    )
    return events, report


def test_a_divergence_is_told_before_its_cause_is_looked_for(saved: Callable[[str], Path]) -> None:
    events, report = told(TANH, saved("one-block"))
    [line] = [event for event in events if event.startswith(DIVERGES)]
    assert events.index(line) == events.index("looking for the cause") - 1
    assert line == f"{DIVERGES}{report.forward.semantic_failures[0].exact.rms:.1e}, gate 1e-12"


def test_a_known_reference_tells_a_divergence_after_one_image(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_REF_CACHE", str(tmp_path))
    (first, cold), (second, warm) = (told(TANH, saved("one-block")) for _ in range(2))
    [line] = [event for event in second if event.startswith(DIVERGES)]
    assert line.endswith(", gate 1e-12, on the first image")
    assert [event for event in first if not event.startswith(DIVERGES)] == [step for step in second if step != line]
    assert second[second.index(line) - 1] == "nnx_tutorial-wrong_gelu: twice the same"
    assert to_json(cold) == to_json(warm)
    events, report = told(RIGHT, saved("one-block"))
    assert report.passed and not [event for event in events if "divergence" in event]


class Unrepeatable:
    """A candidate whose second run differs from the first."""

    calls = 0

    def __call__(self, pixels: Any) -> Any:
        self.calls += 1
        return pixels.mean((1, 2)) @ np.full((pixels.shape[-1], CASES["rectangular"].config.num_labels), self.calls)


def test_a_candidate_that_is_not_repeatable_is_told_that_alone(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_REF_CACHE", str(tmp_path))
    told(TANH, saved("one-block"))
    lines: list[str] = []
    with pytest.raises(InputError, match="two runs on the same inputs differ"):
        vit_ref.check_port(Unrepeatable(), saved("one-block"), fail_fast=True, on_divergence=lines.append)
    assert not lines


def test_a_first_look_names_the_first_wrong_value_in_order() -> None:
    truth = {name: np.ones(3) for name in "abc"}
    look = FirstLook(truth, ["a", "b", "c"])
    look.see("a", np.ones(3))
    assert look.divergence is None
    look.see("c", np.full(3, 2.0))
    look.see("b", np.ones(4))
    look.see("unknown", np.zeros(1))
    assert look.divergence is not None
    site, error = look.divergence
    assert site == "b" and error.reason == "wrong shape (4,), not (3,)"
    assert describe_divergence("mine", site, error) == "mine: first divergence at b: wrong shape (4,), not (3,)"


def test_a_first_look_says_nothing_that_rounding_may_explain() -> None:
    look = FirstLook({"a": np.ones(3), "b": np.ones(3)}, ["a", "b"])
    look.see("a", np.full(3, 1 + 9e-8))
    look.see("b", np.full(3, 2.0))
    assert look.divergence is None
    look.see("a", np.full(3, 1 + 2e-7))
    assert look.divergence is not None and look.divergence[0] == "a"


def test_a_first_look_says_nothing_of_values_that_are_not_float64() -> None:
    look = FirstLook({"a": np.ones(3)}, ["a"])
    look.see("a", np.full(3, 2, np.float32))
    assert look.divergence is None


def test_an_expected_failure_does_not_end_a_run_that_fails_fast(saved: Callable[[str], Path]) -> None:
    wrong = ("block.0.mlp.hidden", "block.0.mlp.out", "block.0.mlp.residual", "norm", "logits")
    expected = dict.fromkeys(wrong, "tanh GELU")
    report = vit_ref.check_port(
        TANH, saved("one-block"), backward=False, fail_fast=True, expected_failed_checks=expected
    )
    assert report.passed and report.forward.has_rounding and report.behaviour
    assert report.not_backward == "not requested"


def test_wrong_gradients_end_a_run_that_fails_fast(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "check_behaviour", lambda *_, **__: pytest.fail("behaviour was checked"))
    backward = session.compare_backward

    def wrong(*arguments: Any, **options: Any) -> ParityReport:
        found = backward(*arguments, **options)
        return dataclasses.replace(found, unobserved=("pixels",))

    monkeypatch.setattr(session, "compare_backward", wrong)
    report = vit_ref.check_port(None, saved("one-block"), fail_fast=True)
    assert not report.passed and report.forward.passed and report.backward is not None
    assert report.not_behaviour == STOPPED.replace("forward", "backward")


def test_the_command_says_what_a_run_that_failed_fast_left_out(deep: Path) -> None:
    ended = CliRunner().invoke(main, ["verify", str(deep), "--candidate", TANH, "--fail-fast", "--quick"])
    assert ended.exit_code == 1, ended.output
    assert ended.stderr == ""
    said = " ".join(ended.stdout.split())
    assert re.search(r"a cut of \S*deep: first divergence at block\.0\.mlp\.hidden: float64", said)
    assert "likely cause: tanh GELU" in said
    assert f"float32 rounding (not run: the formula is wrong in float64), gradients ({STOPPED})" in said
    assert f"behaviour ({STOPPED})" in said
    assert (
        "note: quick: this is a verdict on a cut of the checkpoint, and none on the whole: blocks 0 and 2 of 3" in said
    )


def test_a_cut_is_verified_and_the_report_says_so(deep: Path) -> None:
    report = vit_ref.check_port(RIGHT, deep, quick=True, backward=False)
    whole = vit_ref.check_port(RIGHT, deep, backward=False)
    assert report.passed and whole.passed
    assert report.title == f"a cut of {whole.title}"
    assert report.checkpoint == whole.checkpoint
    assert report.cut == ((0, 2), (4, 4), (20, 20), 40) and whole.cut is None
    assert to_json(report)["cut"] == {"blocks": [0, 2], "grid": [4, 4], "image_size": [20, 20], "tensors": 40}
    last = f"PASSED: nnx_tutorial on a cut of {whole.title} against FlaxViT, float32"
    assert summary(report).splitlines()[-1] == last
    assert {result.site for result in report.forward.results if result.site.startswith("block.")} == {
        result.site for result in whole.forward.results if result.site.startswith(("block.0", "block.1"))
    }
    assert report.notes[0].startswith("quick: ") and not [note for note in whole.notes if note.startswith("quick")]
    # Another depth and another number of tokens round otherwise, so this was no run of the whole.
    assert report.forward.results[-1].rounding != whole.forward.results[-1].rounding


def test_expected_failures_are_refused_for_a_cut_before_any_work(tmp_path: Path) -> None:
    """Block 1 of a cut is the last block of the checkpoint, so a pattern would cover another block."""
    with pytest.raises(
        InputError,
        match=r"^quick renumbers blocks, so 'forward/block\.1\.\*' of expected_failed_checks may cover another block:"
        r" leave out quick or expected_failed_checks$",
    ):
        vit_ref.check_port(RIGHT, tmp_path / "none", quick=True, expected_failed_checks={"forward/block.1.*": "known"})


def test_this_packages_own_model_is_verified_on_a_cut(deep: Path) -> None:
    report = vit_ref.check_port(None, deep, quick=True, backward=False)
    assert report.passed and report.candidate == "vit_ref"


def test_photographs_are_cropped_for_a_cut(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {})
    pixels = np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen: list[Any] = []

    class Recorded(session.Session):
        def __init__(self, config: Any, source: Any, pixels: Any, *rest: Any, **options: Any):
            seen.append(pixels)
            super().__init__(config, source, pixels, *rest, **options)

    monkeypatch.setattr(session, "Session", Recorded)
    assert vit_ref.check_port(None, deep, images=tmp_path, quick=True, backward=False).passed
    full = session.pixels_for(vit_ref.from_pretrained(deep).config, tmp_path, session.FORWARD)
    assert np.array_equal(seen[0], full[:, 5:25, 5:25])


def test_a_candidate_of_fixed_depth_is_told_what_quick_changes(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "fixed.py").write_text(FIXED)
    assert vit_ref.check_port(str(tmp_path / "fixed.py"), deep, backward=False).passed
    advice = (
        "quick changes num_hidden_layers from 3 to 2 and the image size from 30 x 30 to 20 x 20: make load() read both"
        " from the checkpoint, or leave out quick"
    )
    with pytest.raises(
        CandidateError,
        match=r"fixed: load\(\) raised MappingError: .*; " + advice.replace("(", r"\(").replace(")", r"\)"),
    ):
        vit_ref.check_port(str(tmp_path / "fixed.py"), deep, quick=True)
    ended = CliRunner().invoke(main, ["verify", str(deep), "--candidate", str(tmp_path / "fixed.py"), "--quick"])
    assert ended.exit_code == 2
    assert ended.stderr.endswith(f"; {advice}\n") and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [(None, "this file does not exist: check the path"), ("import no_such", "No module named 'no_such'")],
)
def test_a_candidate_that_is_not_found_is_told_nothing_of_quick(
    text: str | None, fault: str, deep: Path, tmp_path: Path
) -> None:
    file = tmp_path / "typo.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CandidateError) as raised:
        vit_ref.check_port(str(file), deep, quick=True)
    assert fault in str(raised.value) and "quick" not in str(raised.value)


def test_a_checkpoint_with_nothing_to_cut_is_one_line_and_exit_code_2(saved: Callable[[str], Path]) -> None:
    ended = CliRunner().invoke(main, ["verify", str(saved("one-block")), "--quick"])
    assert ended.exit_code == 2
    assert ended.stderr == (
        f"vit-ref: {saved('one-block')}: num_hidden_layers is 1 and the grid is 2 x 8 patches, so there is nothing to"
        " cut: leave out quick\n"
    )
