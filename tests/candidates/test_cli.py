"""Does the command line report the findings and the exit code, and is unusable input one line and exit code 2?"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner, Result

import vit_ref
from tests.helpers.synthetic_reports import REPORTS
from vit_ref.cli.commands import main
from vit_ref.cli.console import show_progress
from vit_ref.errors import InputError, TruncatedError
from vit_ref.verify import judgement, session, stream
from vit_ref.verify.cases import CASES
from vit_ref.verify.environment import environment
from vit_ref.verify.precision import PRECISIONS
from vit_ref.verify.report import headline, to_html, to_json
from vit_ref.verify.results import CandidateReport
from vit_ref.weights import conversion

# The package's attributes of these names become functions once `vit_ref.cli.commands` is imported.
verify_command, convert_command = (import_module(f"vit_ref.cli.{name}") for name in ("verify", "convert"))

Invoke = Callable[..., Result]
# The cursor moves up by one line and erases it.
ERASED = "\x1b[1A\x1b[2K"
RIGHT = REPORTS["right"]


@pytest.fixture
def invoke() -> Invoke:
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one block."""
    source = CASES["stored-float64"].checkpoint()
    directory = tmp_path_factory.mktemp("given") / "tiny"
    vit_ref.weights.writing.write_directory(
        directory, {name: tensor.astype("f4") for name, tensor in source.tensors.items()}, source.config
    )
    return directory


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Lets `check_port` return a given report, and returns the list of its calls."""

    def find(name: str) -> list[Any]:
        calls: list[Any] = []

        def judged(*arguments: Any, progress: Callable[[str], None], **options: Any) -> CandidateReport:
            progress("something")
            calls.append((*arguments, options))
            return REPORTS[name]()

        monkeypatch.setattr(session, "check_port", judged)
        return calls

    return find


@pytest.mark.parametrize(("name", "code"), [("right", 0), ("wrong", 1), ("misbehaving", 1), ("expected failures", 1)])
def test_the_exit_code_is_the_verdict(name: str, code: int, found: Callable[[str], list[Any]], invoke: Invoke) -> None:
    found(name)
    ended = invoke("verify", "anywhere")
    assert ended.exit_code == code, ended.output
    assert ended.stdout.splitlines()[-1].startswith("FAILED: " if code else "PASSED: ")
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "\x1b" not in ended.output  # no colours without a terminal


def test_one_wrong_candidate_of_two_is_a_failure(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    monkeypatch.setattr(session, "check_port", lambda candidate, *_, **__: REPORTS[candidate]())
    for order in (("right", "wrong"), ("wrong", "right")):
        ended = invoke("verify", "anywhere", "--candidate", order[0], "--candidate", order[1])
        assert ended.exit_code == 1
        assert "PASSED" in ended.stdout and "FAILED" in ended.stdout


def test_the_given_options_reach_the_check(found: Callable[[str], list[Any]], invoke: Invoke) -> None:
    calls = found("right")
    options = ["--reference", "numpy", "--dtype", "bfloat16", "--images", "photographs", "--forward-only"]
    options += ["--ignore", "vit.pooler.*", "--ignore", "x"]
    assert invoke("verify", "anywhere", "--candidate", "mine", *options).exit_code == 0
    asked = {"images": Path("photographs"), "precision": "bfloat16", "reference": "numpy", "backward": False}
    asked |= {"ignore": ("vit.pooler.*", "x"), "fail_fast": False, "quick": False, "cache": True}
    ((*given, options),) = calls
    del options["on_part"], options["on_divergence"]
    assert (given, options) == (["mine", "anywhere"], asked)
    assert invoke("verify", "anywhere", "--fail-fast", "--quick").exit_code == 0
    assert (calls[1][-1]["fail_fast"], calls[1][-1]["quick"]) == (True, True)


def test_a_streamed_check_gets_the_same_options(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    calls = []
    monkeypatch.setattr(stream, "check_streamed", lambda *given, **options: calls.append((given, options)) or RIGHT())
    assert invoke("verify", "anywhere", "--stream", "--dtype", "bfloat16").exit_code == 0
    ((given, options),) = calls
    del options["progress"], options["on_part"]
    assert given == ("anywhere",)
    asked = {"images": None, "ignore": (), "precision": "bfloat16", "reference": "flax", "backward": True}
    assert options == {**asked, "fail_fast": False, "cache": True}


def test_the_table_has_every_site(found: Callable[[str], list[Any]], invoke: Invoke) -> None:
    found("wrong")
    ended = invoke("verify", "anywhere", "--table")
    lines = [line.split()[0] for line in ended.stdout.splitlines() if line.endswith("both")]
    assert {"block.0.norm1", "block.1.mlp.residual", "blocks.0.attn.query.kernel", "pixels"} <= set(lines)


def test_files_that_are_not_images_are_counted(
    tmp_path: Path, found: Callable[[str], list[Any]], invoke: Invoke
) -> None:
    found("right")
    for name in ("a.gif", "b.heic", "c.HEIC", "notes.txt"):
        (tmp_path / name).touch()
    ended = invoke("verify", "anywhere", "--images", tmp_path)
    assert ended.stderr == "vit-ref: left out, because the suffix is not that of an image: 3 files (2 .heic, 1 .txt)\n"
    assert invoke("verify", "anywhere").stderr == ""


def test_reports_are_written(tmp_path: Path, found: Callable[[str], list[Any]], invoke: Invoke) -> None:
    found("wrong")
    page, document = tmp_path / "a.html", tmp_path / "a.json"
    assert invoke("verify", "anywhere", "--html", page, "--json", document).exit_code == 1
    assert page.read_text() == to_html(REPORTS["wrong"]())
    assert json.loads(document.read_text())["passed"] is False
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.json"]


@pytest.mark.parametrize(("option", "begins"), [("--json", "{"), ("--html", "<!doctype html>")])
def test_a_dash_prints_only_the_report_on_standard_output(
    option: str, begins: str, tmp_path: Path, found: Callable[[str], list[Any]], invoke: Invoke, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found("wrong")
    ended = invoke("verify", "anywhere", option, "-", "--table")
    assert ended.exit_code == 1
    assert ended.stdout.startswith(begins)
    if option == "--json":
        assert json.loads(ended.stdout) == to_json(REPORTS["wrong"]())
    else:
        assert ended.stdout == to_html(REPORTS["wrong"]())
    # Everything else goes to standard error.
    assert ended.stderr.splitlines()[-1].startswith("FAILED: ")
    assert not list(tmp_path.iterdir())


def test_one_standard_output_takes_one_report(invoke: Invoke) -> None:
    ended = invoke("verify", "anywhere", "--json", "-", "--html", "-")
    assert (ended.exit_code, ended.stderr) == (
        2,
        "vit-ref: -: --html and --json name the same file: give two different files\n",
    )


@pytest.mark.parametrize(("name", "code"), [("right", 2), ("wrong", 1)])
def test_forward_findings_are_printed_without_gradients(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    forward = dataclasses.replace(REPORTS[name](), backward=None, not_backward="FlaxViT itself is not finite")

    def judged(candidate: str, *_: Any, **__: Any) -> CandidateReport:
        return judgement.complete(forward, True) if candidate == "forward" else RIGHT()

    monkeypatch.setattr(session, "check_port", judged)
    # The verdict on another candidate does not change this one's.
    for others in ([], ["--candidate", "another"]):
        ended = invoke("verify", "anywhere", "--candidate", "forward", *others)
        assert ended.exit_code == code
        names = "candidate forward: " if others else ""
        assert " ".join(ended.stdout.split()).startswith(names + " ".join(headline(forward.forward).split()))
        assert "not observed: gradients (FlaxViT itself is not finite)" in " ".join(ended.stdout.split())
        assert ended.stderr == ("vit-ref: FlaxViT itself is not finite\n" if code == 2 else "")
    ended = invoke("verify", "anywhere", "--candidate", "forward", "--json", tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert ended.exit_code == code
    assert (document["not_backward"], document["passed"]) == ("FlaxViT itself is not finite", code == 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "no/such/place"], "no/such/place: no such directory or file"),
        (["verify", "{tiny}", "--candidate", "gone.py"], "gone.py: this file does not exist"),
        (["verify", "{tiny}", "--candidate", "no.such.module"], "no.such.module: importing it raised"),
        (
            ["verify", "--images", "a"],
            "--images needs a CHECKPOINT, and there is none: give one, or leave out --images",
        ),
        (
            ["verify", "--ignore", "a"],
            "--ignore needs a CHECKPOINT, and there is none: give one, or leave out --ignore",
        ),
        (["verify", "--quick"], "--quick needs a CHECKPOINT, and there is none: give one, or leave out --quick"),
        (["verify", "a", "--quick", "--stream"], "--stream verifies every block and --quick two: give one of the two"),
        (["verify", "--stream"], "--stream needs a CHECKPOINT, and there is none: give one, or leave out --stream"),
        (["verify", "{tiny}", "--images", "gone"], "gone: this directory of images does not exist: give one"),
        (["verify", "{tiny}", "--html", "gone/a.html"], "gone/a.html: its directory does not exist: make it first"),
        (["verify", "{tiny}", "--json", "gone/a.json"], "gone/a.json: its directory does not exist: make it first"),
        (["verify", "no/such/place", "--html", "y" * 300], "no/such/place: no such directory or file"),
        (["verify", "{tiny}", "--html", "{tiny}"], "{tiny}: it is a directory: give the name of a file"),
        (["verify", "no/such/place", "--json", "/proc/a.json"], "/proc/a.json: it cannot be written ("),
        (["verify", "no/such/place", "--json", "/dev/fd/1"], "no/such/place: no such directory or file"),
        (
            ["verify", "{tiny}", "--html", "a", "--json", "./a"],
            "a: --html and --json name the same file: give two different files",
        ),
        (
            ["verify", "{tiny}", "--json", "a.json", "--candidate", "a.py", "--candidate", "b.py"],
            "--html and --json hold one report, and there are 2 candidates: give one",
        ),
        (
            ["verify", "{tiny}", "--stream", "--candidate", "a.py"],
            "--stream verifies only this package's model: leave out --candidate or --stream",
        ),
        (
            ["verify", "{tiny}", "--stream", "--reference", "torch"],
            "the reference torch runs whole models only: with --stream use flax or numpy",
        ),
        (["convert", "no/such/place", "out", "--to", "hf"], "no/such/place: no such directory or file"),
        (["propose", "{tiny}", "--candidate", "gone.py"], "gone.py: this file does not exist"),
    ],
)
def test_an_unusable_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = invoke(*(argument.format(tiny=tiny) for argument in arguments))
    assert ended.exit_code == 2, ended.output
    assert len(ended.output.splitlines()) == 1
    assert ended.stderr.startswith(f"vit-ref: {message.format(tiny=tiny)}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["verify", "a", "--precision", "int8"],
            "'int8' is not one of 'float32', 'tensorfloat32', 'bfloat16', 'mixed'",
        ),
        (["verify", "a", "--reference", "keras"], "'keras' is not one of 'flax', 'torch', 'numpy'"),
        (["convert", "a", "b"], "Missing option '--to'"),
        (["convert", "a", "b", "--to", "bin"], "'bin' is not one of 'hf', 'flax', 'npz', 'big_vision', 'timm'"),
        (["propose", "a"], "Missing option '--candidate'"),
        (["verify", "--json"], "Option '--json' requires an argument."),
        (["finetun"], "No such command 'finetun'"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments: list[str], message: str, invoke: Invoke) -> None:
    ended = invoke(*arguments)
    assert ended.exit_code == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith("vit-ref: ") and message in line and line.endswith(" --help")


def test_json_is_written_though_the_page_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke
) -> None:
    def unwritable(*arguments: Any) -> str:
        raise InputError("no page")

    monkeypatch.setattr(session, "check_port", lambda *arguments, **options: REPORTS["wrong"]())
    monkeypatch.setattr("vit_ref.verify.report.to_html", unwritable)
    ended = invoke("verify", "anywhere", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    assert (ended.exit_code, ended.stderr) == (2, "vit-ref: no page\n")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_candidate_that_cannot_compute_in_float64_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke
) -> None:
    def truncated(*arguments: Any, **options: Any) -> CandidateReport:
        raise TruncatedError("mine must compute in float64")

    monkeypatch.setattr(session, "check_port", truncated)
    ended = invoke("verify", "anywhere", "--json", tmp_path / "a.json")
    assert (ended.exit_code, ended.stderr) == (2, "vit-ref: mine must compute in float64\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke) -> None:
    def interrupted(*arguments: Any, **options: Any) -> CandidateReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "check_port", interrupted)
    ended = invoke("verify", "anywhere", "--html", tmp_path / "a.html")
    assert (ended.exit_code, ended.stderr) == (130, "vit-ref: interrupted; no file is half-written\n")
    assert not list(tmp_path.iterdir())


COMPILING = """
import os, signal, threading
import jax, jax.numpy as jnp

def slow(x):
    for _ in range(400):
        x = jnp.sort(x + 1)
    return x

def load(checkpoint):
    lowered = jax.jit(slow).lower(jnp.ones(8))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    return lowered.compile()

import vit_ref
candidate = vit_ref.Candidate(load=load)
"""
# Runs as the installed command. A conversion is interrupted when all of it is written and nothing is renamed yet.
COMMAND = """
import os, signal, sys
from vit_ref.cli.commands import main
from vit_ref.weights import conversion

# A shell that starts something in the background has it ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
conversion._read_back = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main())
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "{tiny}", "--candidate", "port.py", "--html", "out/a.html"],
        ["convert", "{tiny}", "out/copy", "--to", "hf"],
        ["convert", "{tiny}", "out/copy.npz", "--to", "npz"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_a_real_interrupt_is_exit_code_130_and_writes_nothing(arguments: list[str], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "port.py").write_text(COMPILING)
    command = [sys.executable, "-c", COMMAND, *(argument.format(tiny=tiny) for argument in arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stderr) == (130, "vit-ref: interrupted; no file is half-written\n")
    assert not ended.stdout and not list((tmp_path / "out").iterdir())


# The same during the import of a module: click before the arguments are read, jax within a command.
IMPORTING = """
import os, signal, sys

class Interrupting:
    def find_spec(name, *_):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                pass  # as what is being imported may do

sys.meta_path.insert(0, Interrupting)
signal.signal(signal.SIGINT, {handler})
import vit_ref.cli.entry
sys.exit(vit_ref.cli.entry.main())
"""


@pytest.mark.parametrize("module", ["click", "jax"])
@pytest.mark.parametrize(
    ("handler", "code", "said"),
    [
        ("signal.default_int_handler", 130, "vit-ref: interrupted; no file is half-written\n"),
        # As a shell starts a background process.
        ("signal.SIG_IGN", 0, ""),
    ],
    ids=["a person's", "ignored"],
)
def test_an_interrupt_of_the_imports_ends_quietly(module: str, handler: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", IMPORTING.format(module=module, handler=handler), "env"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, said)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_jax(option: str) -> None:
    program = "import sys; from vit_ref.cli.commands import main; main(standalone_mode=False); print(*sys.modules)"
    command = [sys.executable, "-c", program, option]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "vit_ref.cli.verify" in modules
    assert not {"jax", "flax", "numpy", "transformers", "torch"} & set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--candidate", "gone.py"],
        ["compare", "gone.py", "mine"],
        ["compare", "mine", "gone.py:other"],
        ["propose", "--candidate", "gone.py"],
        ["propose", "--reference", "gone.py", "--candidate", "mine"],
    ],
)
def test_a_file_that_does_not_exist_is_refused_before_jax_is_imported(arguments: list[str]) -> None:
    program = "import sys\nfrom vit_ref.cli.commands import main\ntry: main()\nfinally: print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "vit-ref: gone.py: this file does not exist: check the path\n")
    assert not {"jax", "flax", "numpy", "transformers", "torch"} & set(ended.stdout.split())


def test_the_choices_of_options_match_the_library() -> None:
    assert tuple(PRECISIONS) == verify_command.PRECISIONS
    assert get_args(conversion.Target) == convert_command.LAYOUTS


@pytest.mark.parametrize("when", ["before the arguments", "arguments", "command"])
def test_an_interrupt_has_one_exit_code_whenever_it_comes(
    when: str, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = {"before the arguments": "make_context", "arguments": "parse_args", "command": "invoke"}[when]
    monkeypatch.setattr(click.Group if when == "command" else click.Command, place, interrupted)
    ended = invoke("verify", "anywhere")
    assert (ended.exit_code, ended.stderr) == (130, "vit-ref: interrupted; no file is half-written\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets rich print as on a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_a_line_above_the_bar_is_for_a_terminal(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    with show_progress(2) as step:
        step.say("first divergence at b")
    assert capsys.readouterr().err == ""
    request.getfixturevalue("terminal")
    with show_progress(2) as step:
        step.say("first divergence at b")
    assert "vit-ref: first divergence at b\n" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_a_bar_names_the_step_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(2) as step:
        step("FlaxViT in float64")
    printed = capsys.readouterr()
    assert "FlaxViT in float64" in printed.err and not printed.out


@pytest.mark.usefixtures("terminal")
def test_the_bar_is_erased_before_a_report_is_printed_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3) as steps:
        steps("FlaxViT in float64")
        capsys.readouterr()
        with steps.hidden():
            assert capsys.readouterr().err.endswith(ERASED)
            time.sleep(0.3)  # a bar that is not hidden is drawn ten times a second
            assert capsys.readouterr() == ("", "")
        steps("gradients")
    assert "gradients" in capsys.readouterr().err


def test_convert_prints_what_it_did(tiny: Path, tmp_path: Path, invoke: Invoke) -> None:
    ended = invoke("convert", tiny, tmp_path / "copy", "--to", "hf")
    assert ended.exit_code == 0, ended.output
    assert "24 tensors, read back, every parameter the same to the last bit" in ended.stdout
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_a_path_that_is_no_text_is_written_and_printed(tiny: Path, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("vit-ref"),
        "convert",
        tiny,
        tmp_path / os.fsdecode(b"copy-\xff"),
        "--to",
        "hf",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "copy-\\udcff" in ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "{tiny}", "--forward-only", "--reference", "numpy"],
        ["--help"],
    ],
    ids=["a report", "help"],
)
def test_a_closed_pipe_is_not_a_verdict(arguments: list[str], tiny: Path) -> None:
    command = [Path(sys.executable).with_name("vit-ref"), *(argument.format(tiny=tiny) for argument in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stderr
        running.stdout.close()
        said = running.stderr.read()
    assert (running.returncode, said) == (141, "")


def test_a_wrong_call_with_a_closed_pipe_is_not_a_verdict() -> None:
    command = [Path(sys.executable).with_name("vit-ref"), "convert"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        assert running.stderr
        running.stderr.close()
    assert running.returncode == 141


def test_the_installed_command_judges_a_checkpoint(tiny: Path) -> None:
    command = [Path(sys.executable).with_name("vit-ref"), "verify", tiny, "--forward-only", "--reference", "numpy"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    name = f"{tiny.parent.name}/tiny"
    assert ended.stdout.startswith(f"{name}: 17 sites pass: largest float64 error ")
    assert ended.stdout.splitlines()[-1] == f"PASSED: vit_ref on {name} against NumPy, float32"
    digest = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert f"weights: sha256 {digest}" in ended.stdout.splitlines()
    assert not ended.stderr


def test_without_a_checkpoint_each_candidate_gets_embedded_case(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    calls = []

    def judge(candidate: str | None, directory: Path, **_: Any) -> CandidateReport:
        calls.append((candidate, directory, vit_ref.weights.checkpoint.read(directory).tensors))
        return RIGHT()

    monkeypatch.setattr(session, "check_port", judge)
    assert invoke("verify").exit_code == 0
    assert invoke("verify", "--candidate", "a", "--candidate", "b").exit_code == 0
    assert [candidate for candidate, _, _ in calls] == [None, "a", "b"]
    expected = CASES["rectangular"].checkpoint().tensors
    for _, directory, tensors in calls:
        assert directory.parts[-2:] == ("embedded", "rectangular")
        assert not directory.exists()
        assert tensors.keys() == expected.keys()
        assert all((tensors[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("candidate", [None, "nnx_tutorial"])
def test_the_embedded_case_is_named_in_the_report(candidate: str | None, tmp_path: Path, invoke: Invoke) -> None:
    arguments: list[str | Path] = ["verify", "--forward-only", "--json", tmp_path / "a.json"]
    if candidate:
        arguments += ["--candidate", Path(__file__).parent / "worked" / f"{candidate}.py"]
    ended = invoke(*arguments)
    assert ended.exit_code == 0, ended.output
    assert f"PASSED: {candidate or 'vit_ref'} on embedded/rectangular" in ended.stdout
    written = json.loads((tmp_path / "a.json").read_text())["checkpoint"]
    assert (written["name"], written["path"]) == ("embedded/rectangular", "")


def test_the_version_is_one_line(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"vit-ref {vit_ref.__version__}\n"


def test_env_prints_the_whole_stack(tmp_path: Path, invoke: Invoke) -> None:
    lines = invoke("env").stdout.splitlines()
    assert lines == [f"{name} {value}" for name, value in environment().items()]
    assert [line for line in lines if line.startswith("jax ")]
    assert invoke("env", "--json", tmp_path / "a.json").stdout.splitlines() == lines
    assert json.loads((tmp_path / "a.json").read_text()) == environment()


def test_a_dash_prints_only_json_on_standard_output(invoke: Invoke) -> None:
    ended = invoke("env", "--json", "-")
    assert json.loads(ended.stdout) == environment()
    assert f"vit-ref {vit_ref.__version__}\n" in ended.stderr


def test_a_conversion_is_written_as_json(tiny: Path, tmp_path: Path, invoke: Invoke) -> None:
    ended = invoke("convert", tiny, tmp_path / "copy", "--to", "hf", "--json", tmp_path / "a.json")
    assert ended.exit_code == 0, ended.output
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "source": str(tiny),
        "destination": str(tmp_path / "copy"),
        "read": "hf",
        "written": "hf",
        "tensors": 24,
        "left_behind": [],
    }


@pytest.mark.parametrize(
    "command", ["convert {tiny} copy --to hf", "propose {tiny} --candidate a.py", "predict {tiny} a.png", "env"]
)
def test_an_impossible_json_file_is_reported_before_the_work(
    command: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = invoke(*command.format(tiny=tiny).split(), "--json", "gone/a.json")
    assert (ended.exit_code, ended.stderr) == (2, "vit-ref: gone/a.json: its directory does not exist: make it first\n")
    assert not list(tmp_path.iterdir())


def test_no_command_at_all_prints_the_help(invoke: Invoke) -> None:
    ended = invoke()
    assert ended.exit_code == 2 and "verify" in ended.stderr and "Usage" in ended.stderr


def test_a_program_may_catch_the_output_of_the_command() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as caught, pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and caught.getvalue().startswith("vit-ref ")
