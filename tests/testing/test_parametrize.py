"""Does `parametrize_with_checks` pass on the expected failures?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vit_ref
from tests.helpers.synthetic_reports import REPORTS
from vit_ref.testing import parametrize, parametrize_with_checks
from vit_ref.verify.cases import CASES

EXPECTED = {"block.*": "known"}


@pytest.mark.parametrize("given", [EXPECTED, lambda candidate: EXPECTED if candidate == "port.py" else {}])
def test_expected_failures_are_a_mapping_or_a_function(
    given: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filled
) -> None:
    asked = []

    def judge(*arguments: Any, **options: Any) -> vit_ref.CandidateReport:
        asked.append(options)
        return REPORTS["right"]()

    monkeypatch.setattr(parametrize, "check_port", judge)
    vit_ref.save_pretrained(filled(CASES["one-head"].config), tmp_path)
    mark = parametrize_with_checks("port.py", tmp_path, expected_failed_checks=given).mark
    [check] = [param.values[0] for param in mark.args[1] if param.id == "forward/logits"]
    check()
    assert asked == [{"cache": False, "expected_failed_checks": EXPECTED}]


def test_a_candidate_that_cannot_be_used_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filled
) -> None:
    asked = []

    def judge(*arguments: Any, **options: Any) -> vit_ref.CandidateReport:
        asked.append(options)
        raise vit_ref.InputError("port.py: nothing to judge")

    monkeypatch.setattr(parametrize, "check_port", judge)
    vit_ref.save_pretrained(filled(CASES["one-head"].config), tmp_path)
    for param in parametrize_with_checks("port.py", tmp_path).mark.args[1][:3]:
        with pytest.raises(vit_ref.InputError, match=r"^port\.py: nothing to judge$"):
            param.values[0]()
    assert len(asked) == 1


@pytest.mark.parametrize("option", ["quick", "fail_fast"])
def test_an_option_that_leaves_checks_out_is_refused_when_tests_are_collected(option: str, tmp_path: Path) -> None:
    with pytest.raises(
        vit_ref.InputError,
        match=rf"^parametrize_with_checks: {option} leaves checks out, and their cases would be skipped as if they did"
        rf" not apply: leave out {option}$",
    ):
        parametrize_with_checks("port.py", tmp_path / "none", **{option: True})


def test_the_facade_imports_jax_only_when_used() -> None:
    program = (
        "import sys, vit_ref.testing\n"
        "assert not {'jax', 'flax', 'pytest'} & set(sys.modules)\n"
        "assert not hasattr(vit_ref.testing, 'no_such_name')\n"
        "assert vit_ref.testing.parametrize_with_checks is vit_ref.parametrize_with_checks\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
