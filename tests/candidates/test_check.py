"""What does a user get from `check_port`, from pytest in a project of their own, and from this suite?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_ref
from tests.helpers.inner_pytest import run_inside
from tests.helpers.processes import run_pytest
from tests.helpers.synthetic_reports import REPORTS
from vit_ref.errors import InputError
from vit_ref.testing import parametrize
from vit_ref.testing.parametrize import SiteCheck
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.results import CandidateReport, Check
from vit_ref.verify.session import count_steps

ROOT = Path(__file__).parents[2]
PORT = """
import vit_ref


def load(checkpoint, dtype):
    return vit_ref.from_pretrained(checkpoint, dtype=dtype)


candidate = vit_ref.Candidate(load=load)
logits = vit_ref.Candidate(load=load, sites={})
"""


TANH = """
import dataclasses

import vit_ref


def load(checkpoint, dtype):
    config = vit_ref.from_pretrained(checkpoint).config
    return vit_ref.from_pretrained(checkpoint, config=dataclasses.replace(config, hidden_act="gelu_new"), dtype=dtype)


candidate = vit_ref.Candidate(load=load)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one block, with a candidate beside it."""
    source = CASES["stored-float64"].checkpoint()
    root = tmp_path_factory.mktemp("given")
    tensors = {name: tensor.astype(np.float32) for name, tensor in source.tensors.items()}
    vit_ref.weights.writing.write_directory(root / "tiny", tensors, source.config)
    (root / "port.py").write_text(PORT)
    return root / "tiny"


@pytest.fixture(scope="module")
def judged(tiny: Path) -> tuple[CandidateReport, list[str]]:
    """This package's model as a declared candidate, and the reported steps."""
    said: list[str] = []
    return vit_ref.check_port(str(tiny.parent / "port.py"), tiny, progress=said.append), said


def statuses(report: CandidateReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for check in report.checks:
        found.setdefault(check.status, []).append(check.name)
    return found


def test_a_right_candidate_passes_every_check(judged: tuple[CandidateReport, list[str]]) -> None:
    report, said = judged
    assert report.passed
    assert list(statuses(report)) == ["passed"]
    names = [check.name for check in report.checks]
    assert len(names) == len(set(names)) == 17 + 17 + 24 + 1 + 4
    assert names[0] == "forward/patches" and "backward/blocks.0.attn.query.kernel" in names
    assert report.candidate == "port" and report.title == "/".join(report.checkpoint.path.split("/")[-2:])
    assert report.backward.objectives in LOOKS
    assert len(said) == count_steps(backward=False) + report.backward.objectives


def test_sites_and_gradients_are_in_the_order_of_the_pass(judged: tuple[CandidateReport, list[str]]) -> None:
    report, _ = judged
    for part in (report.forward, report.backward):
        assert part is not None
        assert tuple(result.site for result in part.results) == part.order
    assert report.forward.order[:2] == ("patches", "embeddings") and report.backward.order[-1] == "pixels"


def test_a_site_without_a_value_is_not_observed(tiny: Path) -> None:
    report = vit_ref.check_port(f"{tiny.parent / 'port.py'}:logits", tiny, backward=False)
    found = statuses(report)
    assert report.passed
    assert [name for name in found["passed"] if name.startswith("forward/")] == ["forward/logits"]
    assert len([name for name in found["not observed"] if name.startswith("forward/")]) == 16
    assert report.not_backward == "not requested"


def test_a_function_of_the_pixels_is_a_candidate(tiny: Path) -> None:
    model = vit_ref.from_pretrained(tiny)

    def wrong(pixels: jax.Array) -> jax.Array:
        return model(pixels) * jnp.asarray(1 + 1e-9, pixels.dtype)

    report = vit_ref.check_port(wrong, tiny, backward=False)
    assert report.candidate == "wrong"
    assert [check.name for check in report.checks if check.status == "failed"] == ["forward/logits"]


def test_an_expected_failure_that_passes_is_an_error(tiny: Path) -> None:
    file, known = str(tiny.parent / "port.py"), {"forward/logits": "known", "block.0.*": "was wrong once"}
    report = vit_ref.check_port(file, tiny, backward=False, expected_failed_checks=known)
    assert not report.passed
    stale = statuses(report)["stale expectation"]
    assert "forward/logits" in stale and "forward/block.0.norm1" in stale and "forward/norm" not in stale
    with pytest.raises(InputError, match=r"expected_failed_checks: 'block\.7\.\*' matches no check of .*/tiny"):
        vit_ref.check_port(file, tiny, backward=False, expected_failed_checks={"block.7.*": "misspelt"})


def test_without_a_backward_pass_the_reason_is_given(tiny: Path) -> None:
    report = vit_ref.check_port(None, tiny, reference="numpy")
    assert report.candidate == "vit_ref" and report.reference == "NumPy"
    assert report.not_backward == "the NumPy oracle has no gradients: use the reference flax, or torch for whole models"
    assert statuses(report)["not observed"] == ["backward/pixels"]


@pytest.mark.parametrize(
    ("report", "name", "outcome", "text"),
    [
        ("right", "forward/logits", None, ""),
        ("right", "backward/pixels", pytest.skip.Exception, "not requested"),
        ("right", "behaviour/jit", pytest.skip.Exception, "does not apply to a candidate of this kind"),
        ("wrong", "forward/block.0.norm1", pytest.fail.Exception, "tiny: first divergence at block.0.norm1"),
        ("wrong", "backward/pixels", pytest.fail.Exception, "float64 relative RMS error 3.3e-05, gate 1e-12"),
        ("misbehaving", "behaviour/batch", pytest.fail.Exception, "another output than in its batch"),
        ("expected failures", "forward/block.0.norm1", pytest.xfail.Exception, "known"),
        (
            "expected failures",
            "forward/embeddings",
            pytest.fail.Exception,
            "it passes, but was expected to fail (was wrong once): remove",
        ),
        ("output alone is shown", "forward/patches", pytest.skip.Exception, "the candidate's sites do not name it"),
    ],
)
def test_a_case_of_pytest_ends_as_its_check(
    report: str, name: str, outcome: type[BaseException] | None, text: str
) -> None:
    check = SiteCheck(name, REPORTS[report])
    if outcome is None:
        check()
        return
    with pytest.raises(outcome) as caught:
        check()
    assert text in str(caught.value)


def test_every_check_of_a_candidate_is_a_case(tiny: Path, judged: tuple[CandidateReport, list[str]]) -> None:
    mark = vit_ref.parametrize_with_checks(str(tiny.parent / "port.py"), tiny).mark
    assert mark.args[0] == "check"
    ids = [param.id for param in mark.args[1]]
    # A candidate in jax is not checked for writing into its images, and any other is not checked for compiling.
    assert [name for name in ids if name != "behaviour/inputs"] == [check.name for check in judged[0].checks]


def test_a_candidate_is_verified_once_and_by_one_worker(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def judged(*arguments: Any, **options: Any) -> CandidateReport:
        calls.append((arguments, options))
        return REPORTS["right"]()

    monkeypatch.setattr(parametrize, "check_port", judged)
    params = vit_ref.parametrize_with_checks("port.py", tiny, backward=False, reference="numpy").mark.args[1]
    for param in params:
        if param.id in ("forward/patches", "forward/logits"):
            param.values[0]()
    assert calls == [(("port.py", tiny), {"cache": False, "backward": False, "reference": "numpy"})]
    assert {(mark.name, mark.args) for param in params for mark in param.marks} == {
        ("xdist_group", (f"{tiny} port.py",))
    }


def test_a_check_knows_its_site() -> None:
    assert Check("backward/blocks.0.norm1.scale", "passed").site == "blocks.0.norm1.scale"


def test_three_lines_in_a_project_make_one_case_per_site(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    (tmp_path / "test_port.py").write_text(
        "import vit_ref\n\n"
        f"@vit_ref.parametrize_with_checks({str(tiny.parent / 'port.py')!r}, {str(tiny)!r}, backward=False)\n"
        "def test_port(check):\n    check()\n"
    )
    ended = run_pytest(tmp_path, "-p", "no:randomly", "-v", "--strict-markers")
    assert ended.returncode == 0, ended.stdout
    assert "test_port[forward/block.0.attn.query] PASSED" in ended.stdout
    assert "21 passed, 1 skipped" in ended.stdout


FORWARD = "vit_ref/testing/suite/test_parity.py"


def test_the_suite_verifies_a_candidate_instead_of_the_model(tiny: Path, tmp_path: Path) -> None:
    right = tiny.parent / "port.py"
    wrong = tmp_path / "tanh.py"
    wrong.write_text(TANH)
    arguments = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-m", "parity", "-q"]
    ended = run_inside(ROOT, *arguments, "--checkpoint", tiny, "--candidate", right, "--candidate", wrong, FORWARD)
    assert ended.returncode == 1
    assert "tiny-port: 17 sites pass" in ended.stdout
    assert "tiny-tanh: first divergence at block.0.mlp.hidden" in ended.stdout
    assert "likely cause: tanh GELU" in ended.stdout
    assert "rectangular" not in ended.stdout  # this package's own cases take no part
    failed = [line for line in ended.stdout.splitlines() if line.startswith("FAILED")]
    assert failed and all("tiny-tanh" in line for line in failed)
