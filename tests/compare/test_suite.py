"""Do pytest's options compare a candidate with a reference that a person declared?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compare.test_command import FILE


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "sides.py").write_text(FILE)
    suite = ["--pyargs", "vit_ref.testing.suite", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *suite, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_each_candidate_is_compared_with_the_declared_reference(tmp_path: Path) -> None:
    found = run(tmp_path, "--reference", "sides.py", "--candidate", "sides.py", "--candidate", "sides.py:wrong")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "first divergence at last" in found.stdout
    # Of the wrong one the formula and the rounding fail, forward and backward, and it behaves.
    assert "4 failed, 6 passed" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "sides.py"], "--reference sides.py makes its own inputs: give a --candidate"),
        (["--reference", "no.such"], "no.such: importing it raised ModuleNotFoundError"),
    ],
)
def test_a_reference_that_cannot_be_used_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    found = run(tmp_path, *arguments)
    assert found.returncode == 2
    assert message in found.stdout + found.stderr
