"""One check of a candidate by any reference: its parts, and the report that they make."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from numpy.typing import NDArray

from vit_ref.errors import InputError, PartlyJudgedError, UndifferentiableError, UnsupportedByReferenceError
from vit_ref.verify.compare.protocols import Runnable
from vit_ref.verify.environment import environment
from vit_ref.verify.precision import Precision
from vit_ref.verify.results import Behaviour, CandidateReport, ParityReport, require_expectations
from vit_ref.weights.origin import Origin


class Judgement(ABC):
    """One candidate and one reference, made ready to be compared.

    Attributes:
      title: which checkpoint or case, for reports.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      origin: which checkpoint that is, and the digest of its weights.
      notes: what a report says besides of how the two were run, a line each.
      not_behaviour: what is not known of the candidate's behaviour, and why; "" where all of it is.
    """

    title: str
    candidate: Runnable
    precision: Precision
    notes: tuple[str, ...] = ()
    not_behaviour = ""

    @property
    @abstractmethod
    def origin(self) -> Origin:
        """See the attributes."""

    @abstractmethod
    def forward(self) -> ParityReport:
        """Compares every site, see `compare_forward`."""

    @abstractmethod
    def backward(self) -> ParityReport:
        """Compares every gradient, see `compare_backward`."""

    @abstractmethod
    def behaviour(self) -> tuple[Behaviour, ...]:
        """Runs the candidate in ways that must agree, see `check_behaviour`."""

    @abstractmethod
    def given(self) -> dict[str, NDArray]:
        """Returns the arrays that the reference reads, by name. A candidate may not change them."""

    def report(
        self,
        forward: ParityReport,
        backward: ParityReport | None = None,
        not_backward: str = "",
        behaviour: tuple[Behaviour, ...] = (),
        not_behaviour: str = "",
    ) -> CandidateReport:
        """Returns the report of parts that were judged; the fields are those of `CandidateReport`."""
        return CandidateReport(
            title=self.title,
            checkpoint=self.origin,
            candidate=self.candidate.name,
            reference=forward.reference,
            precision=forward.precision,
            forward=forward,
            backward=backward,
            not_backward=not_backward,
            behaviour=behaviour,
            expected_failed_checks={},
            environment=environment(self.precision),
            not_behaviour=not_behaviour,
            notes=(*self.notes, *self.candidate.notes),
        )

    def check(
        self, *, backward: bool = True, expected_failed_checks: Mapping[str, str] | None = None
    ) -> CandidateReport:
        """Does all of it; arguments and errors are those of `check_port` or `compare`."""
        forward = self.forward()
        gradients, reason, unjudged = judge_gradients(self.backward if backward else None)
        report = self.report(forward, gradients, reason, self.behaviour(), self.not_behaviour)
        report = dataclasses.replace(report, expected_failed_checks=dict(expected_failed_checks or {}))
        require_expectations(report)
        return complete(report, unjudged)


def judge_gradients(measure: Callable[[], ParityReport] | None) -> tuple[ParityReport | None, str, bool]:
    """Returns the report of the gradients, or why there is none, and whether that leaves a question open.

    If the reference or the candidate has no backward pass, there is nothing to judge. If something else cannot be used,
    there was, and the question stays open.

    Args:
      measure: measures them; None where nobody asked.
    """
    if measure is None:
        return None, "not asked for", False
    try:
        return measure(), "", False
    except (UnsupportedByReferenceError, UndifferentiableError) as error:
        return None, str(error), False
    except InputError as error:
        return None, str(error), True


def complete(report: CandidateReport, unjudged: bool) -> CandidateReport:
    """Returns the report if it is an answer: a failure is one, whatever the gradients are.

    Raises:
      PartlyJudgedError: nothing failed, and gradients that were asked for could not be judged.
    """
    if unjudged and report.passed:
        raise PartlyJudgedError(report.not_backward, report)
    return report
