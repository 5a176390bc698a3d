"""Parameters and fixtures of the tests. Each part of a subject's check runs once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vit_ref.testing.plugin import summarise
from vit_ref.testing.suite.judging import BEHAVIOUR_PRECISION, PARTS, Judged, judge, write_report
from vit_ref.testing.suite.subjects import Subject, find_subjects, remove_written
from vit_ref.verify.report import headline, table
from vit_ref.verify.results import Behaviour, ParityReport


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("parity")


def pytest_unconfigure() -> None:
    remove_written()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for part in PARTS:
        if part not in metafunc.fixturenames:
            continue
        params = [
            pytest.param(
                (subject, precision),
                id=f"{subject.name}-{precision}",
                # Under pytest-xdist one worker takes all tests of a subject, because they share one report.
                marks=pytest.mark.xdist_group(subject.name),
            )
            for subject in find_subjects(metafunc.config)
            for precision in (_precisions(metafunc.config) if part != "behaviour" else [BEHAVIOUR_PRECISION])
            if _included(part, subject)
        ]
        metafunc.parametrize(part, params, indirect=True, scope="session")


def _precisions(config: pytest.Config) -> list[str]:
    return config.getoption("precision", None) or ["float32"]


def _included(part: str, subject: Subject) -> bool:
    if part == "gradients":
        return subject.backward
    # `-m consistency` tests the behaviour of this package's own model more thoroughly, so a few embedded cases do here.
    return part == "parity" or subject.candidate is not None or subject.given or subject.backward


def _checked(request: pytest.FixtureRequest) -> Any:
    subject, precision = request.param
    part = request.fixturename
    assert part is not None
    outcome = judge(part, subject, precision)
    if directory := request.config.getoption("parity_report", None):
        for each in _precisions(request.config) if part == "behaviour" else [precision]:
            write_report(Path(directory), subject, each)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome.found


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> ParityReport:
    """Returns the forward report of one subject."""
    return _checked(request)


@pytest.fixture(scope="session")
def gradients(request: pytest.FixtureRequest) -> ParityReport:
    """Returns the backward report of one subject."""
    return _checked(request)


@pytest.fixture(scope="session")
def behaviour(request: pytest.FixtureRequest) -> tuple[Behaviour, ...]:
    """Returns the results of the behaviour checks of one subject."""
    return _checked(request)


@pytest.fixture(autouse=True)
def _summary(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Passes the outcome to the summary at the end of the run, also from worker processes."""
    for part in {"parity", "gradients"} & set(request.fixturenames):
        subject, precision = request.node.callspec.params[part]
        report = request.getfixturevalue(part)
        outcome = judge(part, subject, precision)
        assert isinstance(outcome, Judged)  # otherwise the fixture raised an error
        text = headline(report) + (f"{outcome.weights}\n\n{table(report)}\n" if subject.given else "")
        name = f"{report.what == 'gradients'} {subject.name} {precision}"
        record_property(*summarise(name, text, given=subject.given))
