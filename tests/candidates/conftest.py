"""Where the worked candidates are, and the embedded cases as checkpoints on disk, which is what a port loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_ref.verify.cases import CASES, Case

PORTS = Path(__file__).parent / "worked"
# What a port needs that the extra `test` does not bring everywhere, and how it is had.
NEEDS = {
    "equinox_vmapped.py": ("equinox", "pip install equinox"),
    "torch_timm.py": ("torch", "pip install 'vit-ref[torch]'"),
}
# Differentiating a second block takes as long again to compile, half a minute a port.
ONE_BLOCK = Case("one-block", dataclasses.replace(CASES["rectangular"].config, num_hidden_layers=1))


@pytest.fixture(scope="session")
def port() -> Callable[[str], str]:
    """`port("torch_timm.py:wrong")`: that worked candidate; the test is skipped where its framework is missing."""

    def found(spec: str) -> str:
        file = spec.partition(":")[0]
        if file in NEEDS:
            package, how = NEEDS[file]
            pytest.importorskip(package, reason=f"needs {package}: {how}")
        return str(PORTS / spec)

    return found


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved("deep")`: the directory of that embedded case's checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")

    def written(name: str) -> Path:
        if not (root / name).exists():
            {**CASES, ONE_BLOCK.name: ONE_BLOCK}[name].write(root / name)
        return root / name

    return written
