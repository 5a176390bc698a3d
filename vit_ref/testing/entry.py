"""What pytest loads in every project where `vit_ref` is installed; it stays light and adds no option there.

Its entry point loads it before any conftest, for two reasons. pytest takes the value of an option that it does not know
yet for a directory of tests. A conftest of another project may define an option of the same name, such as `--images`.
So `vit_ref.testing.plugin`, which has the options, is registered only in a run of the parity suite.
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
