"""Runs tests of this suite in this process, so that they meet a mutant that was injected here."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import core, settings

from tests.mutants.outcome import Failure, Outcome
from tests.mutants.remembered import remembered_references

ROOT = Path(__file__).parents[2]
# Plugins that would talk to the outer run's workers, files or hooks, shuffle tests, or collect garbage for seconds.
_WITHOUT = (
    "xdist",
    "randomly",
    "cov",
    "benchmark",
    "cacheprovider",
    "faulthandler",
    "unraisableexception",
    "threadexception",
)


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
    collector, printed = _Collector(), io.StringIO()
    arguments = [argument for name in _WITHOUT for argument in ("-p", f"no:{name}")]
    # Output is caught here, because the inner run's capture would conflict with the outer one's.
    arguments += ["-m", marker, "--capture=no", "-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    arguments += ["--hypothesis-seed=0", f"--basetemp={scratch / 'inner'}", *tests]
    with contextlib.ExitStack() as stack:
        for each in (_fresh_test_modules, fresh_compiler, _own_hypothesis, remembered_references):
            stack.enter_context(each())
        stack.enter_context(contextlib.chdir(ROOT))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        ended = pytest.main(arguments, plugins=[collector])
    assert ended in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), (
        f"pytest ended with {ended}:\n{printed.getvalue()}"
    )
    return Outcome(collector.failed, collector.passed)


@contextlib.contextmanager
def _fresh_test_modules() -> Iterator[None]:
    """Makes the inner run import conftests and tests again, because their caches hold results without the mutant."""
    # Strings, because paths of thousands of modules would take a noticeable part of a mutant's time.
    root = f"{ROOT}{os.sep}"
    places = (f"{root}conftest.py", f"{root}tests{os.sep}", os.sep.join((f"{root}vit_ref", "testing", "suite", "")))

    def ours() -> dict[str, Any]:
        return {
            name: module
            for name, module in list(sys.modules.items())
            if (file := getattr(module, "__file__", None)) and file.startswith(places)
        }

    before, path, environment = ours(), sys.path[:], dict(os.environ)
    for name in before:
        del sys.modules[name]
    os.environ.pop("PYTEST_ADDOPTS", None)
    try:
        yield
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Keeps compiled functions of the right model and the mutant apart, and restores jax's settings.

    LLVM's optimisations are off for both, because compiled code runs only a few times.
    """
    before = dict(jax.config.values)
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        for name, value in before.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)
        jax.clear_caches()


@contextlib.contextmanager
def _own_hypothesis() -> Iterator[None]:
    """Restores the outer run's profile and seed."""
    settings.register_profile("outer run", settings.default)
    seed = core.global_force_seed
    try:
        yield
    finally:
        settings.load_profile("outer run")
        core.global_force_seed = seed
