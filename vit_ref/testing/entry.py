"""What pytest loads in every project where `vit_ref` is installed; it stays light and adds no option there.

`vit_ref.testing.plugin` has the options, and is registered in runs of the parity suite alone. Its own names tell such a
run: the arguments name the suite, or the run starts in the checkout. Other ways were weighed, and each loses more:

- options in every run: pytest refuses the whole run of a project that has an `--images` of its own;
- a prefix, `--vit-images`: every project's `--help` shows it, and a name of the documentation has to be typed longer;
- `-p vit_ref.testing.plugin` from the person: forgotten, it makes `--checkpoint DIR` mean "collect tests in DIR";
- `-p` in the checkout's pyproject.toml: with `--checkpoint DIR` pytest looks for that file from DIR up;
- a conftest: pytest loads it after it took DIR for a directory of tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_SUITE = ("vit_ref", "testing", "suite")


@pytest.hookimpl(tryfirst=True)
def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    run: pytest.Config | None = pluginmanager.get_plugin("pytestconfig")
    if run and runs_the_suite(run.invocation_params):
        pluginmanager.import_plugin("vit_ref.testing.plugin")


def runs_the_suite(started: pytest.Config.InvocationParams) -> bool:
    """Whether the run starts in a directory that holds the suite, or has an argument that names it."""
    named = (".".join(_SUITE), os.sep.join(_SUITE))
    return Path(started.dir, *_SUITE).is_dir() or any(
        name in str(argument) for argument in started.args for name in named
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "parity: the port computes what the reference computes, site by site",
        "xdist_group: keeps tests on one worker, where pytest-xdist is installed",
    ):
        config.addinivalue_line("markers", marker)
