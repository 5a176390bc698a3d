"""What is known of a port after all checks: one entry a check, as machines and people read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from vit_ref.errors import InputError
from vit_ref.verify.compare.behaviour import Behaviour
from vit_ref.verify.compare.forward import ParityReport, SiteResult
from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS, against
from vit_ref.weights.origin import Origin

Status = Literal["passed", "failed", "not observed", "expected failure", "stale expectation"]


class Check(NamedTuple):
    """The outcome of one check.

    Attributes:
      name: what was checked: "forward/block.0.norm1", "backward/blocks.0.norm1.scale", "behaviour/batch".
      status: "not observed" is neither passed nor failed; a "stale expectation" was to fail and passes, an error.
      exact: float64 relative RMS error, None where there is none.
      rounding: relative RMS error in the tested precision, likewise.
      yardstick: the reference's own.
      gate: the largest `rounding` that passes.
      margin: gate over rounding.
      reason: why it is not "passed", in one line.
    """

    name: str
    status: Status
    exact: float | None = None
    rounding: float | None = None
    yardstick: float | None = None
    gate: float | None = None
    margin: float | None = None
    reason: str = ""

    @property
    def site(self) -> str:
        """The name without its kind: a site, a parameter's path, "pixels", or a behaviour."""
        return self.name.partition("/")[2]


@dataclasses.dataclass(frozen=True)
class CandidateReport:
    """The outcome of `check_port`.

    Attributes:
      title: the checkpoint's name.
      checkpoint: which checkpoint that is, and the digest of its weights.
      candidate: the port's name.
      reference: the reference's name.
      precision: the tested precision's name.
      forward: every site.
      backward: every gradient; None where none was measured.
      not_backward: why there is no `backward`, "" where there is.
      behaviour: the same each time, alone, compiled.
      expected_failed_checks: pattern -> reason, as given.
      environment: versions and device, and what there is to know of it under "note".
      not_behaviour: why nothing is known of its behaviour, "" where something is.
      notes: what there is to know of how the candidate was run, a line each.
    """

    title: str
    checkpoint: Origin
    candidate: str
    reference: str
    precision: str
    forward: ParityReport
    backward: ParityReport | None
    not_backward: str
    behaviour: tuple[Behaviour, ...]
    expected_failed_checks: Mapping[str, str]
    environment: Mapping[str, str]
    not_behaviour: str = ""
    notes: tuple[str, ...] = ()

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks: sites, gradients, behaviour; expectations applied."""
        return tuple(self._expected(check) for check in self._found())

    @property
    def passed(self) -> bool:
        """Whether nothing failed that was not expected to, and all that was expected to fail did."""
        return not any(check.status in ("failed", "stale expectation") for check in self.checks)

    def _found(self) -> Iterator[Check]:
        yield from _parity_checks("forward", self.forward)
        if self.backward is not None:
            yield from _parity_checks("backward", self.backward)
        else:
            yield Check("backward/pixels", "not observed", reason=self.not_backward)
        for each in self.behaviour:
            status: Status = "passed" if each.passed else "failed"
            yield Check(f"behaviour/{each.name}", status, exact=each.error, reason=each.reason)
        if self.not_behaviour:
            yield Check("behaviour/batch", "not observed", reason=self.not_behaviour)

    def _expected(self, check: Check) -> Check:
        reason = next((why for what, why in self.expected_failed_checks.items() if matches(what, check)), None)
        if reason is None or check.status == "not observed":
            return check
        if check.status == "failed":
            return check._replace(status="expected failure", reason=reason)
        return check._replace(status="stale expectation", reason=f"it passes, and was to fail: {reason}")


def matches(pattern: str, check: Check) -> bool:
    """Whether an expectation means a check: by its whole name, or by its site alone."""
    return fnmatchcase(check.name, pattern) or fnmatchcase(check.site, pattern)


def require_expectations(report: CandidateReport) -> None:
    """Raises `InputError` where an expectation names no check at all, which would otherwise go unnoticed for ever."""
    names = tuple(report._found())
    for pattern in report.expected_failed_checks:
        if not any(matches(pattern, check) for check in names):
            raise InputError(f"expected_failed_checks: {pattern!r} matches no check of {report.title}")


def _parity_checks(kind: str, report: ParityReport) -> Iterator[Check]:
    for result in report.results:
        yield Check(
            f"{kind}/{result.site}",
            "passed" if not (reason := _why(result, report.precision)) else "failed",
            exact=result.exact.rms,
            rounding=result.rounding,
            yardstick=result.yardstick,
            gate=result.gate,
            margin=result.margin,
            reason=reason,
        )
    for site in report.unobserved:
        reason = "claimed, and never shown: it was not called, or under a transformation of its own"
        yield Check(f"{kind}/{site}", "failed", reason=reason)
    for site in report.unmapped:
        yield Check(f"{kind}/{site}", "not observed", reason="not mapped to anything of the port")


def _why(result: SiteResult, precision: str) -> str:
    if reason := result.incomparable_in(precision):
        return reason
    if result.exact.rms > SEMANTIC_RMS:
        return f"float64 relative RMS {against(result.exact.rms, SEMANTIC_RMS)}"
    if not result.exact.passes_semantic_gate:
        return f"float64 relative maximum {against(result.exact.max, SEMANTIC_MAX)}"
    if not result.passes_numerical_gate:
        return f"relative RMS {against(result.rounding, result.gate)}; the reference's {result.yardstick:.1e}"
    return ""
