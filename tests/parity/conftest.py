"""The subjects of parity: embedded cases and the checkpoints given with --checkpoint, each checked once a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from numpy.typing import NDArray

from vit_ref import checkpoint
from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.errors import InputError
from vit_ref.pretrained import configuration
from vit_ref.verify import photographs
from vit_ref.verify.candidate import OwnCandidate
from vit_ref.verify.cases import CASES, synthetic_images
from vit_ref.verify.parity import ParityReport, check_parity
from vit_ref.verify.pytest_plugin import summarise
from vit_ref.verify.report import headline, table

PHOTOGRAPHS = 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a parity test is about: a checkpoint with images, and whether the person gave it."""

    name: str
    load: Callable[[], tuple[ViTConfig, Checkpoint, NDArray]]
    given: bool = False


@lru_cache(maxsize=1)
def _subjects(checkpoints: tuple[str, ...], images: str | None) -> list[Subject]:
    embedded = [
        Subject(case.name, lambda case=case: (case.config, case.checkpoint(), case.images())) for case in CASES.values()
    ]

    def load(path: str) -> tuple[ViTConfig, Checkpoint, NDArray]:
        source = checkpoint.read(path)
        vit_config = configuration(source)
        if images:
            return vit_config, source, photographs.load(photographs.find(Path(images), PHOTOGRAPHS), vit_config)
        return vit_config, source, synthetic_images(vit_config, PHOTOGRAPHS)

    given = [Subject(Path(path).resolve().name, lambda path=path: load(path), given=True) for path in checkpoints]
    return embedded + given


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parity" in metafunc.fixturenames:
        option = metafunc.config.getoption
        subjects = _subjects(tuple(option("checkpoint")), option("images"))
        params = [
            pytest.param(
                (subject, precision),
                id=f"{subject.name}-{precision}",
                # Under pytest-xdist one worker takes all tests of a subject, so that it is observed once.
                marks=pytest.mark.xdist_group(subject.name),
            )
            for subject in subjects
            for precision in option("precision") or ["float32"]
        ]
        metafunc.parametrize("parity", params, indirect=True, scope="session")


@lru_cache(maxsize=1)
def _check(subject: Subject, precision: str) -> ParityReport | InputError:
    try:
        config, source, pixels = subject.load()
        return check_parity(subject.name, config, source, pixels, OwnCandidate(config, source), precision)
    except InputError as error:
        return error


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> ParityReport:
    subject, precision = request.param
    outcome = _check(subject, precision)
    if isinstance(outcome, InputError):
        pytest.fail(str(outcome), pytrace=False)
    directory = request.config.getoption("parity_report")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = f"{headline(outcome)}\n\n{table(outcome)}\n"
        (Path(directory) / f"{subject.name}-{precision}.txt").write_text(text, encoding="utf-8")
    return outcome


@pytest.fixture(autouse=True)
def _summary(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Hands the outcome to the summary at the end of the run, across worker processes too."""
    if "parity" in request.fixturenames:
        subject, precision = request.node.callspec.params["parity"]
        outcome = request.getfixturevalue("parity")
        text = headline(outcome) + (f"\n\n{table(outcome)}\n" if subject.given else "")
        record_property(*summarise(f"{subject.name} {precision}", text, given=subject.given))
