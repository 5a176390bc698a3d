"""One check of a candidate against any reference: its parts, and the report that they make."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property

from numpy.typing import NDArray

from vit_ref.errors import InputError, PartlyJudgedError, UndifferentiableError, UnsupportedByReferenceError
from vit_ref.verify.compare.first_look import OnDivergence, ignore_divergence
from vit_ref.verify.compare.forward import never
from vit_ref.verify.compare.protocols import Runnable
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.environment import environment
from vit_ref.verify.precision import Precision
from vit_ref.verify.results import Behaviour, CandidateReport, Check, ParityReport, matches, require_expectations
from vit_ref.weights.origin import Extent, Origin

# It gets the report so far, each time a part was measured that is not the last.
OnPart = Callable[[CandidateReport], None]
NOT_REQUESTED = "not requested"
_LATER = "not run yet"
_STOPPED = "not run: the {part} comparison failed, and fail-fast ends the run there"


def ignore_part(report: CandidateReport) -> None:
    """Does nothing with a report."""


class Judgement(ABC):
    """A candidate and a reference that are ready to be compared.

    Attributes:
      title: name of the checkpoint or case, for reports.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      origin: the checkpoint's name and the digest of its weights.
      notes: notes for the report on how the two were run, one line each.
      cut: what is checked of the checkpoint, if it was cut; None if all of it is checked.
      not_behaviour: what is not known of the candidate's behaviour, and why; "" if all of it is.
      on_divergence: gets a line about the first divergence, as soon as it is known.
      tapped: the candidate's output in float64, once the forward pass was compared.
    """

    title: str
    candidate: Runnable
    precision: Precision
    notes: tuple[str, ...] = ()
    cut: Extent | None = None
    not_behaviour = ""
    on_divergence: OnDivergence = staticmethod(ignore_divergence)
    tapped: NDArray | None = None

    @property
    @abstractmethod
    def origin(self) -> Origin:
        """See the attributes."""

    @abstractmethod
    def forward(self, stops: Callable[[str], bool] = never) -> ParityReport:
        """Compares every site.

        Args:
          stops: see `compare_forward`.
        """

    @abstractmethod
    def backward(self) -> ParityReport:
        """Compares every gradient, see `compare_backward`."""

    @abstractmethod
    def behaviour(self) -> tuple[Behaviour, ...]:
        """Runs the candidate in ways that must agree, see `check_behaviour`."""

    @abstractmethod
    def given(self) -> dict[str, NDArray]:
        """Returns the arrays that the reference reads, by name. A candidate may not change them."""

    def keep_output(self, trace: Trace) -> None:
        """Keeps the candidate's output of its trace in float64 for the checks of its behaviour."""
        self.tapped = trace.get(self.candidate.last)

    @cached_property
    def _environment(self) -> Mapping[str, str]:
        return environment(self.precision)

    def report(
        self,
        forward: ParityReport,
        backward: ParityReport | None = None,
        not_backward: str = "",
        behaviour: tuple[Behaviour, ...] = (),
        not_behaviour: str = "",
        expected_failed_checks: Mapping[str, str] | None = None,
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
            expected_failed_checks=dict(expected_failed_checks or {}),
            environment=self._environment,
            not_behaviour=not_behaviour,
            notes=(*self.notes, *self.candidate.notes),
            cut=self.cut,
        )

    def check(
        self,
        *,
        backward: bool = True,
        expected_failed_checks: Mapping[str, str] | None = None,
        fail_fast: bool = False,
        on_part: OnPart = ignore_part,
    ) -> CandidateReport:
        """Runs the whole check. See `check_port` or `compare` for arguments and errors."""
        expected = dict(expected_failed_checks or {})

        def stops(site: str) -> bool:
            check = Check(f"forward/{site}", "failed")
            return fail_fast and not any(matches(pattern, check) for pattern in expected)

        forward = self.forward(stops)
        so_far = self.report(forward, not_backward=_LATER, not_behaviour=_LATER, expected_failed_checks=expected)
        if fail_fast and not so_far.passed:
            why = _STOPPED.format(part="forward")
            return dataclasses.replace(so_far, not_backward=why if backward else NOT_REQUESTED, not_behaviour=why)
        on_part(so_far)
        gradients, reason, unjudged = judge_gradients(self.backward if backward else None)
        so_far = dataclasses.replace(so_far, backward=gradients, not_backward=reason)
        if gradients is not None:
            if fail_fast and not so_far.passed:
                return dataclasses.replace(so_far, not_behaviour=_STOPPED.format(part="backward"))
            on_part(so_far)
        report = dataclasses.replace(so_far, behaviour=self.behaviour(), not_behaviour=self.not_behaviour)
        require_expectations(report)
        return complete(report, unjudged)


def judge_gradients(measure: Callable[[], ParityReport] | None) -> tuple[ParityReport | None, str, bool]:
    """Returns the report of the gradients, or the reason why there is none, and whether a question remains open.

    If the reference or the candidate has no backward pass, there is nothing to check. After any other error the
    caller's question has no answer.

    Args:
      measure: measures the gradients; None if the caller does not want them.
    """
    if measure is None:
        return None, NOT_REQUESTED, False
    try:
        return measure(), "", False
    except (UnsupportedByReferenceError, UndifferentiableError) as error:
        return None, str(error), False
    except InputError as error:
        return None, str(error), True


def complete(report: CandidateReport, unjudged: bool) -> CandidateReport:
    """Returns the report if it answers the caller's question. A failure answers it, whatever the gradients are.

    Args:
      report: the report.
      unjudged: whether the gradients could not be checked.

    Raises:
      PartlyJudgedError: nothing failed, but the gradients could not be checked.
    """
    if unjudged and report.passed:
        raise PartlyJudgedError(report.not_backward, report)
    return report
