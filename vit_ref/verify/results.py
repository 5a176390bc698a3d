"""The results of a verification: what was measured at each site, each check with its status, and the whole report.

Reports, the diagnosis and the commands import these classes from here, so they do not import the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from vit_ref.errors import InputError
from vit_ref.verify.gates import Error, against

if TYPE_CHECKING:
    from vit_ref.weights.origin import Extent, Origin

Status = Literal["passed", "failed", "not observed", "expected failure", "stale expectation"]

BEHAVIOURS = ("repeat", "batch", "jit", "inputs", "untapped")
# Why a claimed site or gradient is missing.
NEVER_SHOWN = "not called, or inside the candidate's own jit, remat, vmap or scan"


class SiteResult(NamedTuple):
    """The errors at one site, each relative to the oracle's value there.

    Attributes:
      site: the site's name.
      oracles: error of the reference against the NumPy oracle, both in float64; None without an oracle.
      exact: error of the candidate in float64.
      alone: error of the candidate when each block is fed the reference's own token stream. One wrong block then does
        not spoil all blocks after it. It is measured only if a site fails: in float64 if the semantic gate failed, else
        in the tested precision. None elsewhere, and in a block whose token stream the candidate does not show.
      rounding: relative RMS error of the candidate in the tested precision; NaN if it was not measured.
      reference_error: relative RMS error of the reference in the tested precision; NaN if it was not measured.
      gate: the largest `rounding` that passes; NaN if rounding was not measured.
      incomparable: why `rounding` cannot be measured, see `Error.reason`; "" if it can.
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
    def has_rounding(self) -> bool:
        """Whether rounding was measured. A run that stops at a wrong formula does not measure it."""
        return not np.isnan(self.gate)

    @property
    def ratio(self) -> float:
        """The candidate's rounding error as a multiple of the reference's."""
        return self.rounding / self.reference_error if self.reference_error else (np.inf if self.rounding else 1.0)

    @property
    def margin(self) -> float:
        """Gate over error: a margin below 1 fails."""
        return self.gate / self.rounding if self.rounding else np.inf

    def incomparable_in(self, precision: str) -> str:
        """Returns why the deciding error is infinite, and in which precision; "" if it is finite.

        Args:
          precision: the tested precision's name.
        """
        if self.exact.reason:
            return f"{self.exact.reason} in float64"
        return f"{self.incomparable} in {precision}" if self.incomparable and self.exact.passes_semantic_gate else ""

    @property
    def passes_numerical_gate(self) -> bool:
        """Whether rounding alone explains the error. True if rounding was not measured."""
        return self.rounding <= self.gate or not self.has_rounding

    def failure(self, precision: str) -> str:
        """Returns why the site fails, the semantic gate before the numerical one; "" if it passes both gates.

        Args:
          precision: the tested precision's name.
        """
        if reason := self.incomparable_in(precision):
            return reason
        if self.exact.rms > self.exact.semantic_gate:
            return f"float64 relative RMS error {against(self.exact.rms, self.exact.semantic_gate)}"
        if not self.exact.passes_semantic_gate:
            return f"float64 relative maximum error {against(self.exact.max, self.exact.semantic_max)}"
        if self.passes_numerical_gate:
            return ""
        return f"{precision} relative RMS error {against(self.rounding, self.gate)}"


class Cause(NamedTuple):
    """A known bug that explains a divergence.

    Attributes:
      label: what the candidate does instead of the right thing.
      site: the first diverging site.
      before: relative RMS error of the candidate at that site, against the oracle.
      after: the same error against an oracle that has the same bug.
      format: the format that the value was rounded to, if that is the bug; else "".
      made_in: what was given the same bug: the oracle, or the reference if there is no oracle.
    """

    label: str
    site: str
    before: float
    after: float
    format: str = ""
    made_in: str = "oracle"

    def __str__(self) -> str:
        return (
            f"{self.label}: the same bug in the {self.made_in} lowers the error at {self.site} from"
            f" {self.before:.1e} to {self.after:.1e}"
        )


class Explanation(NamedTuple):
    """The findings of the diagnosis about a divergence.

    Attributes:
      causes: known bugs that explain it, the best first.
      place: how the value is wrong, to be read after the word "wrong"; "" if all of it is wrong.
      beyond: see `ParityReport.beyond`.
    """

    causes: tuple[Cause, ...] = ()
    place: str = ""
    beyond: str = ""


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The outcome of one pass, forward or backward.

    Attributes:
      title: the name of the checkpoint or case.
      reference: the reference's name.
      precision: the tested precision's name.
      results: one entry per site, in the order of the pass.
      unobserved: sites that the candidate claims but did not show. They fail.
      unmapped: sites that the candidate does not claim. They neither pass nor fail.
      what: what was measured, "sites" or "gradients".
      causes: known bugs that explain the first divergence, the best first.
      place: how the first diverging value is wrong, see `Explanation.place`.
      hidden: sites right before the first divergence that the candidate does not show. The fault may begin there.
      order: all of these names, shown or not, in the order of the pass.
      objectives: over how many objectives the rounding of gradients is pooled; None for the forward pass.
      beyond: if the first divergence is rounding, the next divergence that this rounding does not explain, and its
        size. Its causes are among `causes`. "" if there is none.
      everywhere: whether the reference's values were fed at every site for `SiteResult.alone`, and not to each block.
      nearby: on how many nearby inputs, besides the given ones, the rounding of the forward pass was measured. That is
        done only if an error beyond its gate may be bad luck.
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
    nearby: int = 0

    @property
    def semantic_failures(self) -> tuple[SiteResult, ...]:
        """Sites that fail the semantic gate, in order. The first one is the first divergence."""
        return tuple(result for result in self.results if not result.exact.passes_semantic_gate)

    @property
    def numerical_failures(self) -> tuple[SiteResult, ...]:
        """Sites that fail the numerical gate, in order."""
        return tuple(result for result in self.results if not result.passes_numerical_gate)

    @property
    def has_rounding(self) -> bool:
        """Whether rounding was measured, see `SiteResult.has_rounding`."""
        return all(result.has_rounding for result in self.results)

    @property
    def passed(self) -> bool:
        """Whether every claimed site was shown and passes both gates."""
        return not (self.semantic_failures or self.numerical_failures or self.unobserved)


class Behaviour(NamedTuple):
    """One property that a candidate must have besides right values.

    Attributes:
      name: one of `BEHAVIOURS`. "jit" applies to a candidate that compiles and "inputs" to one that does not.
        "untapped" applies to a candidate that repeats its own values.
      error: relative RMS difference, in float64, between values that must be equal; None if it could not be measured.
      reason: why the property fails; "" if it holds.
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
      status: the outcome. "not observed" neither passes nor fails. "stale expectation" means that an expected failure
        passes, which is an error.
      exact: relative RMS error in float64; None if there is none.
      rounding: relative RMS error in the tested precision; None if there is none.
      reference_error: the reference's own `rounding`; None if there is none.
      gate: the largest `rounding` that passes; None if there is none.
      margin: gate over rounding; None if there is none.
      reason: why the status is not "passed", in one line.
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
      checkpoint: the checkpoint's origin, with the digest of all its weights, even if only a cut was checked.
      candidate: the candidate's name.
      reference: the reference's name.
      precision: the tested precision's name.
      forward: the results at every site.
      backward: the results of every gradient; None if gradients were not measured.
      not_backward: why `backward` is None; "" if it is not.
      behaviour: the properties besides right values, such as the same output for an image alone and in its batch.
      expected_failed_checks: pattern -> reason, as the caller gave them.
      environment: versions and device. The key "note" says what matters about the device.
      not_behaviour: what `behaviour` leaves open, and why; "" if it leaves nothing open.
      notes: how the candidate was run, one line each.
      cut: what was checked of the checkpoint, if it was cut; None if all of it was checked.
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
    cut: Extent | None = None

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks of sites, gradients and behaviour, after the expectations were applied."""
        return tuple(self._expected(check) for check in self._found())

    @property
    def passed(self) -> bool:
        """Whether every check passed, except expected failures, and whether every expected failure did fail."""
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
        stale = f"it passes, but was expected to fail ({reason}): remove the expectation"
        return check._replace(status="stale expectation", reason=stale)


def matches(pattern: str, check: Check) -> bool:
    """Returns whether an expectation matches a check, by the check's whole name or by its site alone."""
    return fnmatchcase(check.name, pattern) or fnmatchcase(check.site, pattern)


def require_expectations(report: CandidateReport) -> None:
    """Checks that each expectation matches a check, because a mistyped pattern would never be noticed.

    Raises:
      InputError: a pattern matches no check.
    """
    names = tuple(report._found())
    for pattern in report.expected_failed_checks:
        if not any(matches(pattern, check) for check in names):
            raise InputError(
                f"expected_failed_checks: {pattern!r} matches no check of {report.title}: correct or remove the pattern"
            )


def _parity_checks(kind: str, report: ParityReport) -> Iterator[Check]:
    for result in report.results:
        yield Check(
            f"{kind}/{result.site}",
            "failed" if (reason := result.failure(report.precision)) else "passed",
            exact=result.exact.rms,
            rounding=result.rounding if result.has_rounding else None,
            reference_error=result.reference_error if result.has_rounding else None,
            gate=result.gate if result.has_rounding else None,
            margin=result.margin if result.has_rounding else None,
            reason=reason,
        )
    for site in report.unobserved:
        yield Check(f"{kind}/{site}", "failed", reason=f"claimed, but never shown: {NEVER_SHOWN}")
    for site in report.unmapped:
        yield Check(f"{kind}/{site}", "not observed", reason="the candidate's sites do not name it")
