"""Does the plugin add its options in runs of the suite, and in no other project?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit_ref.testing import entry

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "directory", "expected"),
    [
        (["--pyargs", "vit_ref.testing.suite"], None, True),
        (["--pyargs", "vit_ref.testing.suite.test_parity"], None, True),
        ([ROOT / "vit_ref" / "testing" / "suite" / "test_parity.py"], None, True),
        (["--checkpoint", "vit"], ROOT, True),
        (["--checkpoint", "vit"], None, False),
        (["tests/testing"], None, False),
    ],
)
def test_a_run_of_the_suite_is_recognised(
    arguments: list[str | Path], directory: Path | None, expected: bool, tmp_path: Path
) -> None:
    started = pytest.Config.InvocationParams(args=arguments, plugins=None, dir=directory or tmp_path)
    assert entry.runs_the_suite(started) is expected


def test_another_project_keeps_an_option_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--images')\n")
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n\n"
        "def test_theirs(request):\n"
        "    assert request.config.getoption('images') == 'theirs'\n"
        "    assert 'vit_ref.testing.entry' in sys.modules\n"
        "    assert not {'jax', 'flax', 'numpy', 'vit_ref.testing.plugin'} & set(sys.modules)\n"
    )
    # Other plugins of this environment import numpy.
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "vit_ref.testing.entry", "--images", "theirs"]
    ended = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_suite_is_found_in_an_editable_install(tmp_path: Path) -> None:
    # Such an install is a path to the checkout; pytest finds the plugin by the metadata of whatever is installed.
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-k", "one-head"]
    command += ["--pyargs", "vit_ref.testing.suite", "--precision", "bfloat16", "--parity-report", "reports"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    collected = sorted(line.rpartition("::")[2] for line in ended.stdout.splitlines() if "::" in line)
    gates = ("test_numerical_gate", "test_numerical_gate_backward", "test_semantic_gate_float64")
    assert collected == [
        "test_behaviour[one-head-float64]",
        *(f"{gate}[one-head-bfloat16]" for gate in (*gates, "test_semantic_gate_float64_backward")),
    ]
    assert (tmp_path / "reports").is_dir()


def test_a_test_is_marked_with_its_folder(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("testing")
