"""The parity suite's options for pytest, and the section "parity" at the end of a run.

`vit_ref.testing.entry` registers this plugin in the runs that have the suite.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

EXIT_BAD_INPUT = 2
_PROPERTY = "parity "


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vit_ref", "numerical parity of ViT candidates")
    group.addoption(
        "--checkpoint",
        action="append",
        default=[],
        metavar="DIR_OR_HUB_ID",
        help="verify on this checkpoint, too; repeatable",
    )
    group.addoption(
        "--candidate",
        action="append",
        default=[],
        metavar="FILE.py|module:attr",
        help="verify this candidate instead of vit_ref's own model, on each --checkpoint or, without one, on the"
        " embedded cases; repeatable",
    )
    group.addoption(
        "--images", metavar="DIR", help="use photographs below DIR for each --checkpoint (default: synthetic)"
    )
    group.addoption(
        "--precision",
        action="append",
        choices=("float32", "tensorfloat32", "bfloat16", "mixed", "float16"),
        help="test this precision with the numerical gate; repeatable (default: float32)",
    )
    group.addoption(
        "--reference",
        metavar="flax|torch|numpy|FILE.py|module:attr",
        help="compare with this reference: flax is FlaxViT of transformers 4, torch is the ViT of transformers in"
        " PyTorch, numpy is the NumPy oracle, which has no backward pass (default: flax); a file or module declares"
        " a reference for any model",
    )
    group.addoption("--parity-report", metavar="DIR", help="write every case's report to DIR: text, JSON, HTML")


def pytest_configure(config: pytest.Config) -> None:
    options = ("checkpoint", "candidate", "images", "reference", "parity_report")
    given = checkpoints, candidates, images, reference, reports = [config.getoption(name, None) for name in options]
    if not any(given):
        return
    from vit_ref.errors import InputError
    from vit_ref.files import require_local
    from vit_ref.verify import photographs
    from vit_ref.verify.candidates import loading
    from vit_ref.verify.references import choice
    from vit_ref.weights import checkpoint

    try:
        for option, path in (("--images", images), ("--parity-report", reports)):
            if path:
                require_local(path, option)
        if reports:
            _require_reports(config, Path(reports))
        # A missing default reference fails only the tests that need it.
        if reference in choice.REFERENCES:
            choice.require(reference)
        elif reference:
            if reference.isidentifier():
                known = ", ".join(choice.REFERENCES)
                raise InputError(f"--reference is {reference!r}: give {known}, or declare one: FILE.py or module:attr")
            loading.find(reference, "reference")
            if not candidates or images:
                raise InputError(f"--reference {reference} makes its own inputs: give a --candidate, and no --images")
        for path in checkpoints if not reference or reference in choice.REFERENCES else ():
            checkpoint.locate(path)
        if images and not checkpoints:
            raise InputError("--images needs a --checkpoint: give one, or omit --images")
        for spec in candidates:
            loading.find(spec)
        if images:
            photographs.find(Path(images), count=1)
    except InputError as error:
        pytest.exit(str(error), returncode=EXIT_BAD_INPUT)


def _require_reports(config: pytest.Config, directory: Path) -> None:
    """Makes the directory of reports, and checks that each case runs in one process, where its report is made."""
    from vit_ref.errors import InputError

    if config.getoption("dist", "no") not in ("no", "loadgroup"):
        raise InputError("--parity-report needs all tests of a case in one process: give --dist loadgroup, too")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"--parity-report is {directory}: nothing can be written there ({error.strerror}): name another"
        ) from None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Returns what products are in the tested precisions, and warnings that matter for the verdict."""
    from vit_ref import image_files
    from vit_ref.verify.environment import describe_products, notes
    from vit_ref.verify.precision import PRECISIONS

    asked = config.getoption("precision") or ["float32"]
    others = image_files.find(Path(config.getoption("images"))).others if config.getoption("images") else []
    reason = "left out, because the suffix is not that of an image"
    left_out = [f"warning: {reason}: {image_files.counted(others)}"] if others else []
    made = [f"{name}: products are {describe_products(PRECISIONS[name])}" for name in asked]
    warnings = [f"warning: {name}: {note}" for name in asked for note in notes(PRECISIONS[name])]
    # A warning about the products holds the whole line about them.
    return left_out + [line for line in made if f"warning: {line}" not in warnings] + warnings


def summarise(name: str, text: str, *, given: bool) -> tuple[str, str]:
    """Returns a test property that carries a parity outcome to the end of the run, also from a worker process.

    Args:
      name: case or checkpoint, with its precision.
      text: the text to print.
      given: whether the caller gave the checkpoint or the candidate. These outcomes are printed last, to be seen.
    """
    return f"{_PROPERTY}{int(given)} {name}", text


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes: dict[str, str] = {}
    for result in ("passed", "failed"):
        for test in terminalreporter.getreports(result):
            outcomes |= {name: text for name, text in test.user_properties if name.startswith(_PROPERTY)}
    if not outcomes:
        return
    from vit_ref.verify.report import explain

    terminalreporter.section("parity")
    terminalreporter.write_line(explain() + "\n")
    for name in sorted(outcomes):
        terminalreporter.write_line(outcomes[name])
