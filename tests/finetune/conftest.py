"""Runs that several tests examine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from tests.helpers.finetuning import OPTIONS, Runner
from vit_ref.cli.commands import main

# Most of these tests import what the extra installs. The header of the run says if they were left out.
if not find_spec("grain"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole_run(runner: Runner) -> tuple[str, tuple[bytes, bytes]]:
    """A run that nothing interrupted: its output and its result."""
    return runner.here("whole"), runner.result("whole")


@pytest.fixture
def refused(runner: Runner) -> Callable[..., str]:
    """`refused(out, *options)`: the one line of a refusal with exit code 2, from this process."""

    def refused(out: str, *options: str) -> str:
        result = CliRunner().invoke(main, ["finetune", "--output-dir", str(runner.directory / out), *OPTIONS, *options])
        assert result.exit_code == 2, result.output
        said = result.output
        assert said.startswith("vit-ref: ")
        assert said.count("\n") == 1, said
        return said.removeprefix("vit-ref: ").rstrip()

    return refused
