"""Runs tests of this suite in this process, so that they meet a mutant that was injected here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.helpers.inner_pytest import ROOT, restored_settings, run_inside
from tests.helpers.remembered import remembered_references
from tests.mutants.outcome import Failure, Outcome


class _Collector:
    def __init__(self) -> None:
        self.failed: dict[str, Failure] = {}
        self.passed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if report.failed:
            self.failed.setdefault(item.nodeid, Failure(call.excinfo.type, report.longreprtext))
        self.passed += report.when == "call" and report.passed
        return report


def run(tests: tuple[str, ...], marker: str, scratch: Path) -> Outcome:
    """Runs tests in an inner pytest that leaves nothing behind.

    Args:
      tests: pytest's arguments: paths from the project's root, and options.
      marker: only tests with this marker run.
      scratch: a directory for temporary files.

    Raises:
      AssertionError: no test ran, or pytest itself failed.
    """
    collector = _Collector()
    arguments = ["-m", marker, "-q", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "--hypothesis-seed=0"]
    with fresh_compiler(), remembered_references():
        ended = run_inside(ROOT, *arguments, f"--basetemp={scratch / 'inner'}", *tests, plugins=[collector])
    assert ended.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), (
        f"pytest ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}"
    )
    return Outcome(collector.failed, collector.passed)


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Keeps compiled functions of the right model and the mutant apart, and restores jax's settings.

    LLVM's optimisations are off for both, because compiled code runs only a few times.
    """
    jax.clear_caches()
    with restored_settings():
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.clear_caches()
