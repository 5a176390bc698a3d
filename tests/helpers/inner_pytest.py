"""Runs of pytest inside this process, which need not import jax and transformers again."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from hypothesis import core, settings

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


class Ended(NamedTuple):
    """How a run ended, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def run_inside(directory: Path, *arguments: str | Path, plugins: Sequence[Any] = ()) -> Ended:
    """Runs pytest in that directory, in this process, and leaves nothing behind.

    Args:
      directory: where the run starts.
      *arguments: pytest's arguments.
      plugins: plugins to register in the run.
    """
    out, err = io.StringIO(), io.StringIO()
    without = [argument for name in _WITHOUT for argument in ("-p", f"no:{name}")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fresh_test_modules())
        stack.enter_context(_own_hypothesis())
        stack.enter_context(restored_settings())
        stack.enter_context(contextlib.chdir(directory))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        # Output is caught here, because the inner run's capture would conflict with the outer one's.
        code = pytest.main([*without, "--capture=no", *map(str, arguments)], plugins=list(plugins))
    return Ended(int(code), out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _fresh_test_modules() -> Iterator[None]:
    """Makes the inner run import conftests and tests again, because their caches hold results of the outer run."""
    # Strings, because paths of thousands of modules would take a noticeable part of the time.
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
def restored_settings() -> Iterator[None]:
    """Restores jax's settings, and drops what was compiled under others."""
    before = dict(jax.config.values)
    try:
        yield
    finally:
        changed = [name for name, value in before.items() if jax.config.values[name] != value]
        for name in changed:
            jax.config.update(name, before[name])
        if changed:
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
