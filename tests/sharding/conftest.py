"""Results of eight simulated devices, measured once by a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sharding.ways import CASE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the case, as a directory."""
    return CASE.write(tmp_path_factory.mktemp("sharding") / "checkpoint").path


@pytest.fixture(scope="session")
def start(directory: Path) -> Callable[..., subprocess.Popen]:
    """`start(devices, program, *arguments)` runs a module of this folder with that many simulated devices."""

    def start(devices: int, program: str, *arguments: Any) -> subprocess.Popen:
        quick = os.environ["VIT_REF_QUICK_XLA_FLAGS"]
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick}"}
        command = [sys.executable, "-m", f"tests.sharding.{program}", str(directory), *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def out(start: Callable[..., subprocess.Popen], directory: Path) -> Path:
    """The directory to which `measure.py` wrote its results."""
    out = directory.parent / "measured"
    out.mkdir()
    process = start(8, "measure", out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return out


@pytest.fixture(scope="session")
def measured(out: Path) -> dict[str, Any]:
    """The results of `measure.py`."""
    return json.loads((out / "measured.json").read_text(encoding="utf-8"))
