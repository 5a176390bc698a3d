"""Do pytest's options do what they say, and is bad input one line and exit code 2?"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vit_ref
import vit_ref.testing.plugin
from vit_ref.verify.cases import CASES
from vit_ref.verify.references.choice import REFERENCES

ROOT = Path(__file__).parents[2]
# A run collects the tests of the whole project in five seconds, and one file at once.
SUITE = "vit_ref/testing/suite"
FORWARD = f"{SUITE}/test_parity.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "parity", "-q", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no/such/place"], "no/such/place: no such directory or file"),
        (["--images", "."], "--images belongs to a --checkpoint: give one"),
        (["--candidate", "gone.py"], "gone.py: no such file"),
        (["--checkpoint", ".", "--images", "no-such-place"], "no-such-place: no such directory of images"),
        (["--checkpoint", ".", "--images", "vit_ref"], "vit_ref: no image in it"),
        (
            ["--collect-only", "--parity-report", "gs://bucket/reports"],
            "--parity-report is gs://bucket/reports: a URL is no path",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    printed = (ended.stdout + ended.stderr).strip().splitlines()
    assert len(printed) == 1 and message in printed[0]


def test_a_checkpoint_outside_the_checkout_is_tested_and_reported(tmp_path: Path, filled) -> None:
    directory = tmp_path / "given-vit"
    # One block: another one would take half the time again, and is written down as the first is.
    vit_ref.save_pretrained(filled(CASES["stored-float64"].config), directory)
    ended = run(SUITE, "--checkpoint", directory, "--parity-report", tmp_path / "reports", "-k", "given-vit")
    assert ended.returncode == 0, ended.stdout
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    for text in (ended.stdout, (tmp_path / "reports" / "given-vit-float32-sites.txt").read_text()):
        assert "given-vit: 17 sites pass; float64 at most " in text
        assert f"\n  weights: sha256 {digest}\n" in text
        assert "\nblock.0.mlp.hidden " in text
    assert "gradients pass" in (tmp_path / "reports" / "given-vit-float32-gradients.txt").read_text()


def test_files_below_images_that_are_none_are_counted_in_the_header(tmp_path: Path) -> None:
    for name in ("a.gif", "b.heic", "notes.txt"):
        (tmp_path / name).touch()
    given = {"precision": None, "images": str(tmp_path)}
    config: Any = SimpleNamespace(getoption=given.get)
    line = "warning: left out, no image by its suffix: 2 files (1 .heic, 1 .txt)"
    assert line in vit_ref.testing.plugin.pytest_report_header(config)
    given["images"] = None
    assert line not in vit_ref.testing.plugin.pytest_report_header(config)


def test_the_reference_is_the_one_that_is_named() -> None:
    ended = run("--reference", "numpy", "-rs", "-k", "rectangular-float32")
    assert ended.returncode == 0, ended.stdout
    assert "x NumPy's own float32 error" in ended.stdout
    assert "NumPy judges no gradients" in ended.stdout


def test_the_known_references_can_be_named_and_no_others() -> None:
    ended = run("--reference", "nobody")
    assert ended.returncode == 4
    known = ended.stderr.partition("choose from")[2].partition(")")[0]
    assert re.findall(r"\w+", known) == list(REFERENCES)


def test_a_damaged_checkpoint_fails_with_its_reason(tmp_path: Path, filled) -> None:
    directory = tmp_path / "given-vit"
    vit_ref.save_pretrained(filled(CASES["rectangular"].config), directory)
    (directory / "model.safetensors").write_bytes(b"nothing")
    ended = run(FORWARD, "--checkpoint", directory, "-k", "given-vit")
    assert ended.returncode == 1
    assert f"{directory / 'model.safetensors'}: damaged or truncated, fetch it again" in ended.stdout
    assert "Traceback" not in ended.stdout
