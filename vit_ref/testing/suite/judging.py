"""Runs the parts of a case's check, each once, and writes the report that they make together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from numpy.typing import NDArray

from vit_ref.errors import InputError, UndifferentiableError, UnsupportedByReferenceError
from vit_ref.files import write
from vit_ref.testing.suite.subjects import Subject
from vit_ref.verify.judgement import Judgement
from vit_ref.verify.pairs.session import PairSession
from vit_ref.verify.report import in_full, to_html, to_json
from vit_ref.verify.results import CandidateReport
from vit_ref.verify.session import BACKWARD as IMAGES_BACKWARD
from vit_ref.verify.session import BACKWARD_OWN, Session, prepare_candidate

# By the name of the fixture that passes the result to a test.
PARTS: dict[str, Callable[[Judgement], Any]] = {
    "parity": lambda session: session.forward(),
    "gradients": lambda session: session.backward(),
    "behaviour": lambda session: session.behaviour(),
}
# Behaviour is checked in float64, whatever precision the numerical gate tests.
BEHAVIOUR_PRECISION = "float64"
NOT_SELECTED = "no selected test covers it"


class Judged(NamedTuple):
    """The result of one part of a check.

    Attributes:
      found: a `ParityReport`, or the behaviours.
      weights: a line with the digest of the weights; "" for an embedded case in memory.
      report: for the forward pass, a report of that part alone; None for the others.
      left_open: for the behaviour, `Judgement.not_behaviour`.
    """

    found: Any
    weights: str
    report: CandidateReport | None
    left_open: str = ""


Outcome = Judged | BaseException
# Reports are small, and in a shuffled run the tests of a subject are far apart.
_OUTCOMES: dict[tuple[Subject, str], dict[str, Outcome]] = defaultdict(dict)


def judge(part: str, subject: Subject, precision: str) -> Outcome:
    """Runs one part of a check, once.

    Args:
      part: one of `PARTS`.
      subject: the subject.
      precision: the tested precision's name.

    Returns:
      The result, or the exception that a test must raise instead.
    """
    outcomes = _OUTCOMES[subject, precision]
    if part not in outcomes:
        outcomes[part] = _judge(part, subject, precision)
    return outcomes[part]


def _judge(part: str, subject: Subject, precision: str) -> Outcome:
    try:
        session, before = _prepare(subject, "float32" if part == "behaviour" else precision)
        with _copying(subject, session, before):
            found = PARTS[part](session)
    except (UnsupportedByReferenceError, UndifferentiableError) as error:
        # There is a verdict on the forward pass. There is none backward, because the NumPy oracle has no gradients or
        # the candidate cannot be differentiated.
        return pytest.skip.Exception(str(error))
    except InputError as error:
        return pytest.fail.Exception(str(error), pytrace=False)
    except pytest.fail.Exception as error:
        return error
    weights = "" if subject.embedded else f"\n  weights: {session.origin.said}"
    report = session.report(found, not_backward=NOT_SELECTED, not_behaviour=NOT_SELECTED) if part == "parity" else None
    return Judged(found, weights, report, session.not_behaviour if part == "behaviour" else "")


@lru_cache(maxsize=1)  # one holds a whole checkpoint, which consecutive tests of a case share
def _prepare(subject: Subject, precision: str) -> tuple[Judgement, dict[str, int]]:
    """Returns a session, and the checksums of the arrays that the reference reads."""
    if subject.declared:
        assert subject.candidate is not None
        pair = PairSession(
            subject.reference, subject.candidate, subject.checkpoint, precision=precision, title=subject.name
        )
        return pair, _checksums(pair.given())
    config, source, pixels = subject.load()
    before = _checksums({"the images": pixels, **source.tensors})
    session = Session(
        config,
        source,
        pixels,
        prepare_candidate(subject.candidate, config, source),
        precision,
        subject.reference,
        title=subject.name,
        images_backward=(IMAGES_BACKWARD if subject.candidate else BACKWARD_OWN) if subject.given else None,
    )
    return session, before


@contextlib.contextmanager
def _copying(subject: Subject, session: Judgement, before: dict[str, int]) -> Iterator[None]:
    """Fails if the candidate writes into arrays that the reference reads."""
    yield
    after = _checksums(session.given())
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        pytest.fail(
            f"{subject.name}: the candidate changed {changed[0]} in place: make it copy them first", pytrace=False
        )


def _checksums(arrays: Mapping[str, NDArray]) -> dict[str, int]:
    return {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}


def write_report(directory: Path, subject: Subject, precision: str) -> None:
    """Writes the results of a case so far as text, JSON and a page.

    A report needs the forward pass, which runs now if no test has run it. Nothing is written if the forward pass cannot
    be compared.

    Args:
      directory: the directory to write to.
      subject: the subject.
      precision: the tested precision's name.
    """
    forward = judge("parity", subject, precision)
    if isinstance(forward, BaseException):
        return
    assert forward.report is not None
    report = forward.report
    backward = _OUTCOMES[subject, precision].get("gradients")
    if isinstance(backward, Judged):
        report = dataclasses.replace(report, backward=backward.found, not_backward="")
    elif backward:
        report = dataclasses.replace(report, not_backward=str(backward))
    behaviour = _OUTCOMES[subject, BEHAVIOUR_PRECISION].get("behaviour")
    if isinstance(behaviour, Judged):
        report = dataclasses.replace(report, behaviour=behaviour.found, not_behaviour=behaviour.left_open)
    elif behaviour:
        report = dataclasses.replace(report, not_behaviour=str(behaviour))
    report = _named_as_by_the_command(report, subject)
    file = directory / f"{subject.name}-{precision}"
    write(f"{file}.txt", in_full(report) + "\n")
    write(f"{file}.json", json.dumps(to_json(report), indent=1) + "\n")
    write(f"{file}.html", to_html(report))


def _named_as_by_the_command(report: CandidateReport, subject: Subject) -> CandidateReport:
    """Returns the report with the names that `vit-ref verify` uses. The directory of an embedded case is left out."""
    checkpoint = report.checkpoint
    if subject.embedded:
        checkpoint = checkpoint._replace(name=subject.embedded, path="")
    title = checkpoint.name
    forward = dataclasses.replace(report.forward, title=title)
    backward = report.backward and dataclasses.replace(report.backward, title=f"{title}, backward")
    return dataclasses.replace(report, title=title, checkpoint=checkpoint, forward=forward, backward=backward)
