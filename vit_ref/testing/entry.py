"""The part that pytest loads in every project where `vit_ref` is installed. It is light and adds no option there.

`vit_ref.testing.plugin` has the options. It is registered only in runs of the parity suite. Such a run has arguments
that name the suite, or starts in the checkout. Other ways lose more:

- Options in every run: pytest refuses the whole run of a project that has its own `--images`.
- A prefix, `--vit-images`: every project's `--help` shows it, and users type a longer name.
- `-p vit_ref.testing.plugin` from the user: if it is forgotten, `--checkpoint DIR` means "collect tests in DIR".
- `-p` in the checkout's pyproject.toml: with `--checkpoint DIR` pytest looks for that file from DIR up.
- A conftest: pytest loads it after it took DIR for a directory of tests.
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
