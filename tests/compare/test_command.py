"""Does `vit-ref compare` report its findings, and end with the right exit code?"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner, Result

import vit_ref
from vit_ref.cli import compare
from vit_ref.cli.commands import main
from vit_ref.verify.pairs import session
from vit_ref.verify.precision import PRECISIONS
from vit_ref.verify.report import SCHEMA
from vit_ref.verify.results import ParityReport

FILE = """
import jax
import jax.numpy as jnp
import numpy as np
import vit_ref

WEIGHTS = {"first": np.linspace(-1, 2, 15, dtype=np.float32).reshape(3, 5), "second": np.ones((5, 2), np.float32)}


def model(act):
    def forward(w, x, tap=lambda name, value: value):
        return tap("last", act(tap("hidden", x @ w["first"])) @ w["second"])

    return lambda checkpoint: (forward, WEIGHTS)


def inputs(seed):
    return {"x": np.random.default_rng(seed).normal(size=(4, 3))}


def noisy(x):
    return x * np.random.default_rng().normal()


reference = vit_ref.Reference(load=model(jnp.tanh), inputs=inputs)
candidate = vit_ref.Candidate(load=model(jnp.tanh))
wrong = vit_ref.Candidate(load=model(jax.nn.sigmoid))
live = vit_ref.Reference(load=lambda checkpoint: noisy, inputs=inputs)
steep = vit_ref.Reference(load=model(lambda x: jnp.sqrt(jnp.abs(x))), inputs=lambda seed: {"x": np.zeros((4, 3))})
like_steep = vit_ref.Candidate(load=model(lambda x: jnp.sqrt(jnp.abs(x))))
wide = vit_ref.Candidate(load=lambda checkpoint: (lambda w, x: x, WEIGHTS))
misnumbered = vit_ref.Candidate(load=model(jnp.tanh), sites={"layers.{i}": "last"})
adapting = vit_ref.Reference(load=model(jnp.tanh), inputs=inputs, adapt=lambda x: x)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "sides.py"
    path.write_text(FILE)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", *arguments])


def test_a_right_candidate_passes_and_its_report_is_written(file: str, tmp_path: Path) -> None:
    found = run(file, file, "--json", str(tmp_path / "report.json"), "--html", str(tmp_path / "report.html"), "--table")
    assert found.exit_code == 0, found.output
    assert "PASSED: sides on sides's own weights against sides, float32" in found.output
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["passed"]
    assert [check["site"] for check in document["forward"]["checks"]] == ["hidden", "last", "output"]
    kinds = {check["site"]: check["kind"] for check in document["backward"]["checks"]}
    assert kinds == {
        "output": "site", "last": "site", "hidden": "site", "first": "parameter", "second": "parameter",
        "input:x": "pixels",
    }  # fmt: skip
    assert all(check["measured"]["oracles"] is None for check in document["forward"]["checks"])
    assert "<html" in (tmp_path / "report.html").read_text()


def test_a_wrong_candidate_fails_at_its_first_divergence(file: str) -> None:
    found = run(file, f"{file}:wrong", "--forward-only")
    assert found.exit_code == 1
    assert "first divergence at last" in found.output
    assert "wrong even with the reference's values before it: last" in " ".join(found.output.split())


def test_the_forward_verdict_is_printed_before_the_gradients_begin(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    backward = session.compare_backward

    def late(*arguments: Any, **options: Any) -> ParityReport:
        printed.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]  # what was flushed
        return backward(*arguments, **options)

    monkeypatch.setattr(session, "compare_backward", late)
    found = run(file, file)
    assert found.exit_code == 0, found.output
    [forward] = printed
    assert forward.startswith("sides's own weights: 3 sites pass: ") and forward.endswith("\n")
    assert found.stdout.startswith(f"{forward}sides's own weights, backward: ")
    assert found.stdout.count("3 sites pass") == 1


def test_a_wrong_formula_ends_a_run_that_fails_fast(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "compare_backward", lambda *_, **__: pytest.fail("gradients were compared"))
    monkeypatch.setattr(session, "check_behaviour", lambda *_, **__: pytest.fail("behaviour was checked"))
    found = run(file, f"{file}:wrong", "--fail-fast", "--json", str(tmp_path / "a.json"))
    assert found.exit_code == 1, found.output
    why = "not run: the forward comparison failed, and fail-fast ends the run there"
    said = " ".join(found.stdout.split())
    assert "first divergence at last" in said
    assert f"float32 rounding (not run: the formula is wrong in float64), gradients ({why}), behaviour ({why})" in said
    document = json.loads((tmp_path / "a.json").read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(document)
    assert (document["backward"], document["not_backward"], document["passed"]) == (None, why, False)
    assert not vit_ref.compare(file, f"{file}:wrong", fail_fast=True).forward.has_rounding


def test_inputs_come_from_a_file_or_a_shape(file: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", x=np.ones((5, 3)))
    for given in (["--inputs", str(tmp_path / "batch.npz")], ["--shape", "x=2,3"]):
        assert run(file, file, "--forward-only", *given).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}", "{file}", "--shape", "x=2,0"], "--shape x=2,0: give a name and sizes of at least 1"),
        (["{file}", "{file}", "--shape", "x=2,3", "--inputs", "{file}"], "give one of the two"),
        (["{file}", "{file}", "--shape", "x=2,3", "--shape", "x=4,3"], "--shape names x, x: give each name once"),
        (["{file}", "{file}", "--shape", "x=2,3", "--seed", "-1"], "--seed"),
        (["{file}", "{file}", "--shape", "x=10000000,10000000"], "make them smaller"),
        (["{file}", "{file}", "--inputs", "{file}"], "cannot be read"),
        (["{file}", "{file}", "--shape", "y=2,3"], "inputs: 'y' is no input of sides: name it 'x'"),
        (["{file}:live", "{file}"], "two runs on the same inputs differ"),
        (["{file}:missing", "{file}"], "has no 'missing'"),
        (["{file}", "{file}", "--checkpoint", "{file}.none"], "no such file or directory"),
        (["{file}", "{file}", "--shape", "x=2,4"], "raised TypeError"),
        (["{file}:adapting", "{file}", "--shape", "y=2,3"], "sides-adapting: it takes no input 'y', only x: correct"),
        (["{file}", "{file}:adapting", "--shape", "y=2,3"], "inputs: 'y' is no input of sides: name it 'x'"),
        (["gone.py", "{file}"], "gone.py: this file does not exist: check the path"),
        (["{file}", "gone.py"], "gone.py: this file does not exist: check the path"),
        (["{file}", "{file}:misnumbered"], "{file}:misnumbered: sites: 'layers.{{i}}': 'last' has no {{i}}"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(file: str, arguments: list[str], message: str) -> None:
    found = run(*(each.format(file=file) for each in arguments))
    assert found.exit_code == 2
    assert message.format(file=file) in found.output
    assert "Traceback" not in found.output and len(found.output.splitlines()) == 1


def test_a_name_is_printed_as_it_is(file: str) -> None:
    """Rich would print a picture in place of ":x:"."""
    assert "input:x: float32 error" in run(f"{file}", f"{file}").output


def test_gradients_that_cannot_be_checked_are_said_after_the_report(file: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", x=np.array([[0, 0, 0], [1, 2, 3]]))
    found = run(f"{file}:steep", f"{file}:like_steep", "--inputs", str(tmp_path / "batch.npz"))
    assert found.exit_code == 2
    assert "PASSED" in found.output
    assert "sides-steep itself is not finite in float64" in found.output.splitlines()[-1]


def test_the_precisions_are_those_of_the_package_but_mixed(file: str) -> None:
    assert {*compare.PRECISIONS, "mixed"} == PRECISIONS.keys()
    with pytest.raises(vit_ref.InputError, match="precision is 'mixed', in which this package's model alone computes"):
        vit_ref.compare(file, file, precision="mixed")


def test_an_output_of_another_shape_fails_and_says_both(file: str) -> None:
    found = run(file, f"{file}:wide", "--forward-only")
    assert found.exit_code == 1
    assert "(4, 3)" in found.output and "(4, 2)" in found.output


def test_a_checkpoint_is_given_to_both_sides_and_named(file: str, tmp_path: Path) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    np.savez(weights / "weights.npz", w=np.ones(3))
    found = run(file, file, "--forward-only", "--checkpoint", str(weights))
    assert found.exit_code == 0 and "/model against sides" in found.output
    shutil.rmtree(weights)
    weights.mkdir()
    assert "no weights in it" in run(file, file, "--checkpoint", str(weights)).output


def test_a_table_is_proposed_beside_the_reference(file: str, tmp_path: Path) -> None:
    arguments = ["propose", "--reference", file, "--candidate", f"{file}:wrong", "--json", str(tmp_path / "a.json")]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    assert '"hidden": "hidden"' in found.output
    assert json.loads((tmp_path / "a.json").read_text())["unshown"] == ["last"]


def test_a_table_is_proposed_on_the_inputs_that_compare_takes(file: str, tmp_path: Path) -> None:
    def proposed(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["propose", "--candidate", file, *arguments])

    np.savez(tmp_path / "batch.npz", x=np.ones((5, 3)))
    for given in (["--inputs", str(tmp_path / "batch.npz")], ["--shape", "x=2,3"], ["--seed", "3"]):
        found = proposed("--reference", file, *given)
        assert found.exit_code == 0 and '"hidden": "hidden"' in found.output, found.output
    assert "raised TypeError" in proposed("--reference", file, "--shape", "x=2,4").output
    both = proposed("--reference", file, "--shape", "x=2,3", "--inputs", str(tmp_path / "batch.npz"))
    assert both.exit_code == 2 and "give one of the two" in both.output
    alone = proposed("--shape", "x=2,3")
    assert alone.exit_code == 2 and "--inputs, --shape and --seed need --reference" in alone.output
