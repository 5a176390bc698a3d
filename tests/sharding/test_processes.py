"""Do two processes with four devices each compute and save what one device does?"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sharding.ways import CASE, digests
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS

pytestmark = pytest.mark.xdist_group("devices")


@pytest.fixture(scope="module")
def together(start: Callable[..., subprocess.Popen], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory to which both processes wrote."""
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(4, "processes", out, coordinator, number) for number in (0, 1)]
    errors = [process.communicate()[1][-3000:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return out


@pytest.fixture(scope="module")
def found(together: Path) -> dict[str, Any]:
    return json.loads((together / "processes.json").read_text(encoding="utf-8"))


def test_the_model_lies_on_both(found: dict[str, Any]) -> None:
    assert found["devices"] == [4, 8]
    assert sum(path.endswith("kernel") for path in found["divided"]) == 6 * CASE.config.num_hidden_layers + 1


def test_logits_and_gradients_are_the_same_formula(found: dict[str, Any]) -> None:
    assert found["errors"].keys() == {"logits", *list_parameters(CASE.config)}
    assert not {
        name: rms for name, (rms, largest) in found["errors"].items() if rms > SEMANTIC_RMS or largest > SEMANTIC_MAX
    }


def test_only_the_first_process_saves_with_the_bytes_of_one(together: Path, measured: dict[str, Any]) -> None:
    assert digests(together / "process-0") == measured["one"]
    assert not (together / "process-1").exists()


@pytest.mark.parametrize(
    ("when", "said"),
    [("before", "Not a directory"), ("between", "the disk is full"), ("unforeseen", "nobody foresaw this")],
)
def test_a_save_that_fails_in_the_first_process_fails_in_both(when: str, said: str, together: Path) -> None:
    first, second = (json.loads((together / f"failing-{number}.json").read_text())[when] for number in (0, 1))
    assert said in first
    assert second.endswith(": the first process could not write: see its own message")
    assert not list(together.glob("full/*"))
