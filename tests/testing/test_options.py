"""Do pytest's options do what they say, and is unusable input one line and exit code 2?"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

import vit_ref
import vit_ref.testing.plugin
from tests.helpers.inner_pytest import Ended, run_inside
from tests.helpers.processes import run_pytest
from vit_ref.cli.commands import main
from vit_ref.verify.cases import CASES
from vit_ref.verify.references.choice import REFERENCES
from vit_ref.verify.report import SCHEMA

ROOT = Path(__file__).parents[2]
# A run that collects the tests of the whole project takes seconds, one file takes none.
SUITE = "vit_ref/testing/suite"
FORWARD = f"{SUITE}/test_parity.py"


def run(*arguments: str | Path) -> Ended:
    return run_inside(ROOT, "-m", "parity", "-q", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no/such/place"], "no/such/place: no such directory or file"),
        (["--images", "."], "--images needs a --checkpoint: give one"),
        (["--candidate", "gone.py"], "gone.py: this file does not exist"),
        (["--checkpoint", ".", "--images", "no-such-place"], "no-such-place: this directory of images does not exist"),
        (["--checkpoint", ".", "--images", "vit_ref"], "vit_ref: it holds no image"),
        (
            ["--collect-only", "--parity-report", "gs://bucket/reports"],
            "--parity-report is gs://bucket/reports: a URL is no path",
        ),
        (
            ["--collect-only", "--parity-report", "tox.ini"],
            "--parity-report is tox.ini: nothing can be written there (File exists)",
        ),
    ],
)
def test_an_unusable_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    require_one_line(run(*arguments), message)


def test_a_report_that_several_processes_would_write_is_refused_in_one_line() -> None:
    # In a process of its own, which has workers, and whose exit code a shell sees.
    ended = run_pytest(ROOT, "-m", "parity", "-q", "--collect-only", "-n", "2", "--parity-report", "reports")
    require_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), "give --dist loadgroup, too")


def require_one_line(ended: Ended, message: str) -> None:
    assert ended.returncode == 2
    printed = (ended.stdout + ended.stderr).strip().splitlines()
    assert len(printed) == 1 and message in printed[0]


def test_a_checkpoint_outside_has_the_report_of_the_command(tmp_path: Path, filled) -> None:
    directory = tmp_path / "given-vit"
    # One block, because a second one takes time and its report has the same form.
    vit_ref.save_pretrained(filled(CASES["stored-float64"].config), directory)
    ended = run(SUITE, "--checkpoint", directory, "--parity-report", tmp_path / "reports", "-k", "given-vit")
    assert ended.returncode == 0, ended.stdout
    page, document = tmp_path / "page.html", tmp_path / "document.json"
    verified = CliRunner().invoke(main, ["verify", str(directory), "--table", f"--html={page}", f"--json={document}"])
    reports = {"txt": verified.stdout, "json": document.read_text(), "html": page.read_text()}
    for kind, expected in reports.items():
        assert (tmp_path / "reports" / f"given-vit-float32.{kind}").read_text() == expected
    assert len(list((tmp_path / "reports").iterdir())) == len(reports)
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert "given-vit: 17 sites pass: largest float64 error " in ended.stdout
    assert f"\n  weights: sha256 {digest}\n" in ended.stdout
    assert "\nblock.0.mlp.hidden " in ended.stdout
    assert "gradients pass" in verified.stdout
    assert f"\nweights: sha256 {digest}\n" in verified.stdout


@pytest.mark.parametrize("judged", ["forward", "behaviour"])
def test_a_part_that_no_test_judges_is_named_in_the_report(judged: str, tmp_path: Path) -> None:
    file = {"forward": FORWARD, "behaviour": f"{SUITE}/test_behaviour.py"}[judged]
    ended = run(file, "--parity-report", tmp_path, "-k", "one-head")
    assert ended.returncode == 0, ended.stdout
    report = json.loads((tmp_path / "one-head-float32.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert (report["title"], report["checkpoint"]["path"]) == ("one-head", "")
    assert report["passed"] and report["forward"]["passed"]
    reason = "no selected test covers it"
    assert report["not_backward"] == reason
    behaviour = {"forward": {("not observed", reason)}, "behaviour": {("passed", "")}}[judged]
    assert {(each["status"], each["reason"]) for each in report["behaviour"]} == behaviour


def test_files_that_are_not_images_are_counted_in_the_header(tmp_path: Path) -> None:
    for name in ("a.gif", "b.heic", "notes.txt"):
        (tmp_path / name).touch()
    given = {"precision": None, "images": str(tmp_path)}
    config: Any = SimpleNamespace(getoption=given.get)
    line = "warning: left out, because the suffix is not that of an image: 2 files (1 .heic, 1 .txt)"
    assert line in vit_ref.testing.plugin.pytest_report_header(config)
    given["images"] = None
    assert line not in vit_ref.testing.plugin.pytest_report_header(config)


def test_the_reference_is_the_one_that_is_named() -> None:
    ended = run(SUITE, "--reference", "numpy", "-rs", "-k", "rectangular-float32")
    assert ended.returncode == 0, ended.stdout
    assert " x NumPy's error" in ended.stdout
    assert "the NumPy oracle has no gradients" in ended.stdout


def test_the_known_references_can_be_named_and_no_others() -> None:
    ended = run("--reference", "nobody")
    assert ended.returncode == 2
    known = ended.stderr.partition("give ")[2].partition(", or declare")[0]
    assert re.findall(r"\w+", known) == list(REFERENCES)


def test_a_damaged_checkpoint_fails_with_its_reason(tmp_path: Path, filled) -> None:
    directory = tmp_path / "given-vit"
    vit_ref.save_pretrained(filled(CASES["rectangular"].config), directory)
    (directory / "model.safetensors").write_bytes(b"nothing")
    ended = run(FORWARD, "--checkpoint", directory, "-k", "given-vit")
    assert ended.returncode == 1
    assert f"{directory / 'model.safetensors'}: it is damaged or truncated (" in ended.stdout
    assert "Traceback" not in ended.stdout
