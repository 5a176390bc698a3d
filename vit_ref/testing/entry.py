"""The part that pytest loads in every project where `vit_ref` is installed. It is light and adds no option there.

Its entry point loads it before any conftest, for two reasons:

- pytest takes the value of an unknown option for a directory of tests;
- another project's conftest may define an option with the same name, such as `--images`.

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
    """Returns whether the run starts in a directory that holds the suite, or has an argument that names it.

    Args:
      started: the directory and arguments of the run.
    """
    spellings = (".".join(_SUITE), os.sep.join(_SUITE))
    return Path(started.dir, *_SUITE).is_dir() or any(
        name in str(argument) for argument in started.args for name in spellings
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "parity: the candidate computes what the reference computes, site by site",
        "xdist_group: keeps tests on one worker if pytest-xdist is installed",
    ):
        config.addinivalue_line("markers", marker)
