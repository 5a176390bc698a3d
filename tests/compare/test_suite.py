"""Do pytest's options compare a candidate with a reference that a file declares?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.test_command import FILE
from tests.helpers.inner_pytest import run_inside
from tests.helpers.processes import run_pytest

SUITE = ("--pyargs", "vit_ref.testing.suite", "-q")


def test_each_candidate_is_compared_with_the_declared_reference(tmp_path: Path) -> None:
    (tmp_path / "sides.py").write_text(FILE)
    sides = ("--reference", "sides.py", "--candidate", "sides.py", "--candidate", "sides.py:wrong")
    found = run_pytest(tmp_path, *SUITE, *sides)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "first divergence at last" in found.stdout
    # The wrong candidate fails both gates, forward and backward, but no check of behaviour.
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
    (tmp_path / "sides.py").write_text(FILE)
    found = run_inside(tmp_path, *SUITE, *arguments)
    assert found.returncode == 2
    assert message in found.stdout + found.stderr
