"""Finds the worked candidates, and writes the embedded cases as checkpoints that a candidate can load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.remembered import remembered_references
from vit_ref.verify.cases import CASES, Case

WORKED = Path(__file__).parent / "worked"
# Packages that a candidate needs and the extra `test` does not always install, with the way to get them.
NEEDS = {
    "equinox_vmapped.py": ("equinox", "pip install equinox"),
    "torch_timm.py": ("torch", "pip install 'vit-ref[torch]'"),
}
# A second block would double the time to compile the gradients.
ONE_BLOCK = Case("one-block", dataclasses.replace(CASES["rectangular"].config, num_hidden_layers=1))


@pytest.fixture(scope="module", autouse=True)
def _references() -> Iterator[None]:
    """Computes each reference's values once for all candidates of the same checkpoint."""
    with remembered_references():
        yield


@pytest.fixture(scope="session")
def locate() -> Callable[[str], str]:
    """Returns a function that finds a worked candidate, such as `locate("torch_timm.py:wrong")`.

    It skips the test if the candidate's framework is missing.
    """

    def found(spec: str) -> str:
        file = spec.partition(":")[0]
        if file in NEEDS:
            package, how = NEEDS[file]
            pytest.importorskip(package, reason=f"needs {package}: {how}")
        return str(WORKED / spec)

    return found


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that gives the directory of an embedded case's checkpoint, such as `saved("deep")`."""
    root = tmp_path_factory.mktemp("checkpoints")

    def written(name: str) -> Path:
        if not (root / name).exists():
            {**CASES, ONE_BLOCK.name: ONE_BLOCK}[name].write(root / name)
        return root / name

    return written
