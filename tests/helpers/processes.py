"""Processes of their own that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def without_torch() -> dict[str, str]:
    """Returns variables of the environment with which transformers does not import PyTorch.

    It does so if PyTorch is installed. That takes two thirds of the time to import FlaxViT, which does not need it.
    """
    return {**os.environ, "USE_TORCH": "0"}


def run_pytest(directory: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs pytest in that directory, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, env=without_torch(), cwd=directory, capture_output=True, text=True, check=False)
