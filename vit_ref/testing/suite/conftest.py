"""The subjects of parity: embedded cases and the checkpoints given with --checkpoint, each checked once a session.

The candidate is this package's own model, or what was given with --candidate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from numpy.typing import NDArray

from vit_ref.errors import InputError, UndifferentiableError, UnsupportedByReferenceError
from vit_ref.model.config import ViTConfig
from vit_ref.testing.plugin import summarise
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.report import headline, table
from vit_ref.verify.results import Behaviour, ParityReport
from vit_ref.verify.session import BACKWARD as IMAGES_BACKWARD
from vit_ref.verify.session import BACKWARD_OWN, FORWARD, Session, prepare_candidate
from vit_ref.weights import checkpoint
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.pretrained import read_configuration

# A backward pass compiles for three times as long as a forward pass, so these stand for all: the others have no other
# derivative. "rectangular-patch" is beyond FlaxViT, and the NumPy oracle goes forward only.
BACKWARD = ("rectangular", "hard-tokens", "no-qkv-bias", "one-head", "pooler")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a parity test is about.

    Attributes:
      name: its id.
      load: reads the checkpoint, its configuration and images.
      backward: whether to go backward too.
      reference: who judges.
      given: whether the person gave the checkpoint or the candidate.
      candidate: the port under test, as given; None for this package's own.
    """

    name: str
    load: Callable[[], tuple[ViTConfig, Checkpoint, NDArray]]
    backward: bool
    reference: str
    given: bool = False
    candidate: str | None = None


def _names(given: tuple[str, ...], short: Callable[[str], str], taken: Iterable[str] = ()) -> list[str]:
    """A short name for each thing that was given, which no other has: reports and files are named by it."""
    found = [short(path) for path in given]
    count = Counter([*found, *taken])
    return [
        name if count[name] == 1 else f"{position}-{re.sub(r'[/:]', '-', path.strip('./'))}"
        for position, (name, path) in enumerate(zip(found, given, strict=True), start=1)
    ]


@lru_cache(maxsize=1)
def _subjects(
    checkpoints: tuple[str, ...], images: str | None, candidates: tuple[str, ...], reference: str
) -> list[Subject]:
    def embed(case: Case) -> tuple[ViTConfig, Checkpoint, NDArray]:
        return case.config, case.checkpoint(), case.images()

    def load(path: str) -> tuple[ViTConfig, Checkpoint, NDArray]:
        source = checkpoint.read(path)
        vit_config = read_configuration(source)
        return vit_config, source, pixels_for(vit_config, images, FORWARD)

    embedded = [Subject(name, partial(embed, case), name in BACKWARD, reference) for name, case in CASES.items()]

    def on_disk(case: Case) -> tuple[ViTConfig, Checkpoint, NDArray]:
        return case.config, _written(case), case.images()

    given = [
        Subject(name, partial(load, path), backward=True, reference=reference, given=True)
        for name, path in zip(
            _names(checkpoints, lambda path: Path(path).resolve().name, CASES), checkpoints, strict=True
        )
    ]
    if not candidates:
        return embedded + given
    # Somebody's port is what is asked about: this package's own model has no part in the answer.
    written = [
        dataclasses.replace(subject, load=partial(on_disk, case))
        for subject, case in zip(embedded, CASES.values(), strict=True)
    ]
    return [
        dataclasses.replace(subject, name=f"{subject.name}-{name}", given=True, candidate=candidate)
        for name, candidate in zip(_names(candidates, lambda path: Path(path).stem), candidates, strict=True)
        for subject in given or written
    ]


@cache
def _written(case: Case) -> Checkpoint:
    """An embedded case's checkpoint in a directory of its own, from which a candidate can load it."""
    return case.write(Path(_scratch().name) / case.name)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vit-ref-")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("parity")


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
            for subject in _subjects(
                tuple(option("checkpoint") or ()),
                option("images"),
                tuple(option("candidate") or ()),
                option("reference") or "flax",
            )
            for precision in (option("precision") or ["float32"] if fixture != "behaviour" else ["float64"])
            if _asked(fixture, subject)
        ]
        metafunc.parametrize(fixture, params, indirect=True, scope="session")


def _asked(fixture: str, subject: Subject) -> bool:
    if fixture == "gradients":
        return subject.backward
    # Of this package's own model `-m consistency` asks more than this on embedded cases: a few are enough.
    return fixture == "parity" or subject.candidate is not None or subject.given or subject.backward


@contextlib.contextmanager
def _prepared(subject: Subject, precision: str) -> Iterator[Session]:
    """A session of a subject; it fails where the candidate writes into what the reference reads."""
    config, source, pixels = subject.load()
    before = _checksums(source, pixels)
    yield Session(
        config,
        source,
        pixels,
        prepare_candidate(subject.candidate, config, source),
        precision,
        subject.reference,
        title=subject.name,
        images_backward=(IMAGES_BACKWARD if subject.candidate else BACKWARD_OWN) if subject.given else None,
    )
    after = _checksums(source, pixels)
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        pytest.fail(f"{subject.name}: the candidate changed {changed[0]} in place: it has to copy it", pytrace=False)


class Judged(NamedTuple):
    """What a check found.

    Attributes:
      found: one report, or the behaviours.
      weights: a line that names the bytes that were judged; "" for an embedded case, which has no file.
    """

    found: Any
    weights: str = ""


def _forward(subject: Subject, precision: str) -> Judged:
    with _prepared(subject, precision) as session:
        return Judged(session.forward(), _weights(session))


def _backward(subject: Subject, precision: str) -> Judged:
    with _prepared(subject, precision) as session:
        return Judged(session.backward(), _weights(session))


def _behaves(subject: Subject, precision: str) -> Judged:
    with _prepared(subject, "float32") as session:
        return Judged(session.behaviour())


def _weights(session: Session) -> str:
    return f"\n  weights: {session.origin.said}" if session.source.files else ""


def _checksums(source: Checkpoint, pixels: NDArray) -> dict[str, int]:
    return {name: zlib.crc32(array.tobytes()) for name, array in {"the images": pixels, **source.tensors}.items()}


CHECKS = {"parity": _forward, "gradients": _backward, "behaviour": _behaves}


@cache  # reports are small, and in a shuffled run a subject's tests are far apart
def _outcome(check: Callable[[Subject, str], Judged], subject: Subject, precision: str) -> Judged | BaseException:
    try:
        return check(subject, precision)
    except (UnsupportedByReferenceError, UndifferentiableError) as error:
        # Forward it is judged. Backward there is nobody to compare with, where the NumPy oracle judges or stands in for
        # FlaxViT, or nothing to compare, where the candidate cannot be differentiated.
        return pytest.skip.Exception(str(error))
    except InputError as error:
        return pytest.fail.Exception(str(error), pytrace=False)
    except pytest.fail.Exception as error:
        return error


def _checked(request: pytest.FixtureRequest) -> Any:
    _, subject, precision = request.param
    outcome = _outcome(*request.param)
    if isinstance(outcome, BaseException):
        raise outcome
    report, directory = outcome.found, request.config.getoption("parity_report", None)
    if directory and isinstance(report, ParityReport):
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = f"{headline(report)}{outcome.weights}\n\n{table(report)}\n"
        (Path(directory) / f"{subject.name}-{precision}-{report.what}.txt").write_text(text, encoding="utf-8")
    return report


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> ParityReport:
    """The forward check of one subject."""
    return _checked(request)


@pytest.fixture(scope="session")
def gradients(request: pytest.FixtureRequest) -> ParityReport:
    """The backward check of one subject."""
    return _checked(request)


@pytest.fixture(scope="session")
def behaviour(request: pytest.FixtureRequest) -> tuple[Behaviour, ...]:
    """What a candidate does besides computing the right values."""
    return _checked(request)


@pytest.fixture(autouse=True)
def _summary(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Hands the outcome to the summary at the end of the run, across worker processes too."""
    for fixture in {"parity", "gradients"} & set(request.fixturenames):
        check, subject, precision = request.node.callspec.params[fixture]
        report = request.getfixturevalue(fixture)
        outcome = _outcome(check, subject, precision)
        assert isinstance(outcome, Judged)  # else the fixture has raised
        text = headline(report) + (f"{outcome.weights}\n\n{table(report)}\n" if subject.given else "")
        name = f"{report.what == 'gradients'} {subject.name} {precision}"
        record_property(*summarise(name, text, given=subject.given))
