"""The subjects of parity: embedded cases and the checkpoints given with --checkpoint, each checked once a session."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache, partial
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
from vit_ref.verify.cases import CASES, Case, synthetic_images
from vit_ref.verify.gradients import check_gradients
from vit_ref.verify.parity import ParityReport, check_parity
from vit_ref.verify.report import headline, table
from vit_ref.verify.trace import UnsupportedByReferenceError
from vit_ref_pytest import summarise

PHOTOGRAPHS = 4
# Backward, one image takes as much memory as forward four: 3.3 GB of a ViT-S/14, and 0.9 GB more with a second.
PHOTOGRAPHS_BACKWARD = 1
# A backward pass compiles for three times as long as a forward pass, so these stand for all: the others have no other
# derivative. "rectangular-patch" is beyond FlaxViT, and the NumPy oracle goes forward only.
BACKWARD = ("rectangular", "hard-tokens", "no-qkv-bias", "one-head", "pooler")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a parity test is about: a checkpoint with images, who judges, whether backward too, whether it was given."""

    name: str
    load: Callable[[], tuple[ViTConfig, Checkpoint, NDArray]]
    backward: bool
    reference: str
    given: bool = False


def _names(checkpoints: tuple[str, ...]) -> list[str]:
    """A short name for each checkpoint, which no other and no embedded case has."""
    short = [Path(path).resolve().name for path in checkpoints]
    taken = Counter([*short, *CASES])
    return [
        name if taken[name] == 1 else f"{position}-{path.strip('./').replace('/', '-')}"
        for position, (name, path) in enumerate(zip(short, checkpoints, strict=True), start=1)
    ]


@lru_cache(maxsize=1)
def _subjects(checkpoints: tuple[str, ...], images: str | None, reference: str) -> list[Subject]:
    def embed(case: Case) -> tuple[ViTConfig, Checkpoint, NDArray]:
        return case.config, case.checkpoint(), case.images()

    embedded = [Subject(name, partial(embed, case), name in BACKWARD, reference) for name, case in CASES.items()]

    def load(path: str) -> tuple[ViTConfig, Checkpoint, NDArray]:
        source = checkpoint.read(path)
        vit_config = configuration(source)
        if images:
            return vit_config, source, photographs.load(photographs.find(Path(images), PHOTOGRAPHS), vit_config)
        return vit_config, source, synthetic_images(vit_config, PHOTOGRAPHS)

    given = [
        Subject(name, partial(load, path), backward=True, reference=reference, given=True)
        for name, path in zip(_names(checkpoints), checkpoints, strict=True)
    ]
    return embedded + given


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = partial(metafunc.config.getoption, default=None)
    for fixture, check in CHECKS.items():
        if fixture not in metafunc.fixturenames:
            continue
        params = [
            pytest.param(
                (check, subject, precision),
                id=f"{subject.name}-{precision}",
                # Under pytest-xdist one worker takes all tests of a subject, so that it is observed once.
                marks=pytest.mark.xdist_group(f"{fixture} {subject.name}"),
            )
            for subject in _subjects(tuple(option("checkpoint") or ()), option("images"), option("reference") or "flax")
            for precision in option("precision") or ["float32"]
            if fixture == "parity" or subject.backward
        ]
        metafunc.parametrize(fixture, params, indirect=True, scope="session")


def _forward(subject: Subject, precision: str) -> ParityReport:
    return _judged(check_parity, subject.name, subject, precision)


def _backward(subject: Subject, precision: str) -> ParityReport:
    return _judged(
        check_gradients,
        f"{subject.name}, backward",
        subject,
        precision,
        PHOTOGRAPHS_BACKWARD if subject.given else None,
    )


def _judged(
    check: Callable[..., ParityReport], title: str, subject: Subject, precision: str, images: int | None = None
) -> ParityReport:
    """The report, unless the candidate wrote into the arrays by which it is judged: the reference reads the same."""
    config, source, pixels = subject.load()
    pixels = pixels[:images]
    before = _checksums(source, pixels)
    report = check(title, config, source, pixels, OwnCandidate(config, source), precision, subject.reference)
    after = _checksums(source, pixels)
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        pytest.fail(f"{title}: the candidate changed {changed[0]} in place: it has to copy it", pytrace=False)
    return report


def _checksums(source: Checkpoint, pixels: NDArray) -> dict[str, int]:
    return {name: zlib.crc32(array.tobytes()) for name, array in {"the images": pixels, **source.tensors}.items()}


CHECKS = {"parity": _forward, "gradients": _backward}


@cache  # reports are small, and in a shuffled run a subject's tests are far apart
def _outcome(
    check: Callable[[Subject, str], ParityReport], subject: Subject, precision: str
) -> ParityReport | BaseException:
    try:
        return check(subject, precision)
    except UnsupportedByReferenceError as error:
        # The NumPy oracle judges forward, or stands in for FlaxViT there; backward there is nobody to compare with.
        return pytest.skip.Exception(str(error))
    except InputError as error:
        return pytest.fail.Exception(str(error), pytrace=False)
    except pytest.fail.Exception as error:
        return error


def _checked(request: pytest.FixtureRequest) -> ParityReport:
    _, subject, precision = request.param
    outcome = _outcome(*request.param)
    if isinstance(outcome, BaseException):
        raise outcome
    directory = request.config.getoption("parity_report", None)
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = f"{headline(outcome)}\n\n{table(outcome)}\n"
        (Path(directory) / f"{subject.name}-{precision}-{outcome.what}.txt").write_text(text, encoding="utf-8")
    return outcome


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> ParityReport:
    """The forward check of one subject."""
    return _checked(request)


@pytest.fixture(scope="session")
def gradients(request: pytest.FixtureRequest) -> ParityReport:
    """The backward check of one subject."""
    return _checked(request)


@pytest.fixture(autouse=True)
def _summary(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Hands the outcome to the summary at the end of the run, across worker processes too."""
    for fixture in CHECKS.keys() & set(request.fixturenames):
        _, subject, precision = request.node.callspec.params[fixture]
        outcome = request.getfixturevalue(fixture)
        text = headline(outcome) + (f"\n\n{table(outcome)}\n" if subject.given else "")
        name = f"{outcome.what == 'gradients'} {subject.name} {precision}"
        record_property(*summarise(name, text, given=subject.given))
