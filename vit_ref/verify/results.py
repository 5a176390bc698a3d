"""The results of a verification: what the engine measured at each site, each check with its status, the whole report.

Reports, the diagnosis and the commands import these classes from here, and so need no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from vit_ref.errors import InputError
from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS, Error, against

if TYPE_CHECKING:
    from vit_ref.weights.origin import Origin

Status = Literal["passed", "failed", "not observed", "expected failure", "stale expectation"]

BEHAVIOURS = ("repeat", "batch", "jit", "inputs", "untapped")
# Why a claimed site or gradient is missing.
NEVER_SHOWN = "not called, or under a transformation of its own (jit, remat, vmap, scan)"


class SiteResult(NamedTuple):
    """What was measured at one site. All errors are relative to the oracle's value there.

    Attributes:
      site: its name.
      oracles: reference against the oracle, both float64; None without an oracle.
      exact: candidate in float64.
      alone: the candidate again with the reference's own token stream fed to each block, so that one block's fault
        does not smear over all after it. Measured where something failed: in float64 if the semantic gate did, else in
        the tested precision; None elsewhere, and in a block whose token stream the candidate does not show.
      rounding: candidate in the tested precision, relative RMS.
      reference_error: reference in the tested precision, relative RMS.
      gate: the largest `rounding` that passes.
      incomparable: why the candidate has no `rounding` error to measure, see `Error.reason`.
    """

    site: str
    oracles: Error | None
    exact: Error
    alone: Error | None
    rounding: float
    reference_error: float
    gate: float
    incomparable: str = ""

    @property
    def ratio(self) -> float:
        """The candidate's rounding error as a multiple of the reference's."""
        return self.rounding / self.reference_error if self.reference_error else (np.inf if self.rounding else 1.0)

    @property
    def margin(self) -> float:
        """How far under its gate the site is: gate over error; below 1 it fails."""
        return self.gate / self.rounding if self.rounding else np.inf

    def incomparable_in(self, precision: str) -> str:
        """Why the error that decides is infinite, and in which precision; "" where it is not."""
        if self.exact.reason:
            return f"{self.exact.reason} in float64"
        return f"{self.incomparable} in {precision}" if self.incomparable and self.exact.passes_semantic_gate else ""

    @property
    def passes_numerical_gate(self) -> bool:
        """Whether rounding alone explains the error."""
        return self.rounding <= self.gate

    def failure(self, precision: str) -> str:
        """Why it fails, the semantic gate before the numerical one; "" where it passes both.

        Args:
          precision: the tested precision's name.
        """
        if reason := self.incomparable_in(precision):
            return reason
        if self.exact.rms > SEMANTIC_RMS:
            return f"float64 relative RMS {against(self.exact.rms, SEMANTIC_RMS)}"
        if not self.exact.passes_semantic_gate:
            return f"float64 relative maximum {against(self.exact.max, SEMANTIC_MAX)}"
        return "" if self.passes_numerical_gate else f"{precision} relative RMS {against(self.rounding, self.gate)}"


class Cause(NamedTuple):
    """A bug that explains a divergence.

    Attributes:
      label: what was done, or taken, instead.
      site: the first diverging site.
      before: relative RMS error there.
      after: what is left of it against a reference with the same bug.
      format: the format that the value was rounded to, where that is the bug; else "".
    """

    label: str
    site: str
    before: float
    after: float
    format: str = ""

    def __str__(self) -> str:
        return f"{self.label}: with it the error at {self.site} falls from {self.before:.1e} to {self.after:.1e}"


class Explanation(NamedTuple):
    """What is known of a divergence besides its size.

    Attributes:
      causes: known bugs that explain it, the best first.
      place: how the value is wrong, after the word "wrong"; "" where all of it is.
      beyond: see `ParityReport.beyond`.
    """

    causes: tuple[Cause, ...] = ()
    place: str = ""
    beyond: str = ""


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The outcome of one parity check.

    Attributes:
      title: which checkpoint or case.
      reference: the reference's name.
      precision: the tested precision's name.
      results: one per site, in the order of the forward pass.
      unobserved: sites that the candidate claims and did not show. They have failed.
      unmapped: sites that it does not claim. They have neither passed nor failed.
      what: what was measured, "sites" or "gradients".
      causes: known bugs that explain the first divergence, the best first.
      place: how the first diverging value is wrong, see `Explanation.place`.
      hidden: sites right before the first divergence that the candidate does not show, where it may have begun.
      order: all of these names, shown or not, in the order of the pass.
      objectives: how many gradients' rounding is pooled over; None forward.
      beyond: where the first divergence is rounding, the next one that this rounding does not explain, and how far
        it is off; its causes are among `causes`.
      everywhere: whether the reference's values were fed at every site for `SiteResult.alone`, and not to each block.
    """

    title: str
    reference: str
    precision: str
    results: tuple[SiteResult, ...]
    unobserved: tuple[str, ...] = ()
    unmapped: tuple[str, ...] = ()
    what: str = "sites"
    causes: tuple[Cause, ...] = ()
    place: str = ""
    hidden: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    objectives: int | None = None
    beyond: str = ""
    everywhere: bool = False

    @property
    def semantic_failures(self) -> tuple[SiteResult, ...]:
        """Sites that fail the semantic gate, in order; the first is the first divergence."""
        return tuple(result for result in self.results if not result.exact.passes_semantic_gate)

    @property
    def numerical_failures(self) -> tuple[SiteResult, ...]:
        """Sites that fail the numerical gate, in order."""
        return tuple(result for result in self.results if not result.passes_numerical_gate)

    @property
    def passed(self) -> bool:
        """Whether every claimed site was observed, and passes both gates."""
        return not (self.semantic_failures or self.numerical_failures or self.unobserved)


class Behaviour(NamedTuple):
    """One property of a port.

    Attributes:
      name: one of `BEHAVIOURS`: "jit" of a port that compiles, "inputs" of one that does not; "untapped" of one that
        does the same each time.
      error: relative RMS between what must be equal, in float64; None where it could not be measured.
      reason: what it means, where the property fails; "" where it holds.
    """

    name: str
    error: float | None
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the property holds."""
        return not self.reason


class Check(NamedTuple):
    """The outcome of one check.

    Attributes:
      name: what was checked: "forward/block.0.norm1", "backward/blocks.0.norm1.scale", "behaviour/batch".
      status: "not observed" is neither passed nor failed; a "stale expectation" was to fail and passes, an error.
      exact: float64 relative RMS error, None where there is none.
      rounding: relative RMS error in the tested precision, likewise.
      reference_error: the reference's own.
      gate: the largest `rounding` that passes.
      margin: gate over rounding.
      reason: why it is not "passed", in one line.
    """

    name: str
    status: Status
    exact: float | None = None
    rounding: float | None = None
    reference_error: float | None = None
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
            "failed" if (reason := result.failure(report.precision)) else "passed",
            exact=result.exact.rms,
            rounding=result.rounding,
            reference_error=result.reference_error,
            gate=result.gate,
            margin=result.margin,
            reason=reason,
        )
    for site in report.unobserved:
        yield Check(f"{kind}/{site}", "failed", reason=f"claimed, and never shown: {NEVER_SHOWN}")
    for site in report.unmapped:
        yield Check(f"{kind}/{site}", "not observed", reason="not mapped to anything of the port")
