"""What a report says where gradients were not, or could not be, judged."""

from __future__ import annotations

from collections.abc import Callable

from vit_ref.errors import InputError, PartlyJudgedError, UndifferentiableError, UnsupportedByReferenceError
from vit_ref.verify.results import CandidateReport, ParityReport


def judge_gradients(measure: Callable[[], ParityReport] | None) -> tuple[ParityReport | None, str, bool]:
    """The report of the gradients, or why there is none, and whether that leaves a question open.

    Where the reference or the candidate has no backward pass there is nothing to judge. Where something else cannot be
    used there was, and who asked for it has no answer.

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
    """The report, if it is an answer: a failure is one whatever the gradients are.

    Raises:
      PartlyJudgedError: nothing failed, and gradients that were asked for could not be judged.
    """
    if unjudged and report.passed:
        raise PartlyJudgedError(report.not_backward, report)
    return report
