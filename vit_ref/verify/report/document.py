"""Turns a `CandidateReport` into JSON. `schema.json` beside this file describes each field of the document."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS, Error
from vit_ref.verify.report.text import decided_checks, next_step, not_fed, wrong_alone
from vit_ref.verify.results import CandidateReport, Cause, Check, ParityReport, SiteResult, Status

if TYPE_CHECKING:
    from vit_ref.weights.origin import Extent

SCHEMA = Path(__file__).with_name("schema.json")


def to_json(report: CandidateReport) -> dict[str, Any]:
    """Returns a report as a dictionary that `json.dumps` accepts, even with `allow_nan=False`.

    Args:
      report: what `check_port` returned.

    Returns:
      A document that `SCHEMA` describes. JSON has no infinity: "Infinity" and "NaN" stand for numbers that are not
      finite. Python's `float` and JavaScript's `Number` read them back.
    """
    checks = report.checks
    counts = Counter(check.status for check in checks)
    sites = frozenset(report.forward.order)
    return {
        "schema_version": 1,
        "passed": report.passed,
        "title": report.title,
        "checkpoint": report.checkpoint._asdict(),
        "cut": report.cut and _cut(report.cut),
        "candidate": report.candidate,
        "reference": report.reference,
        "precision": report.precision,
        "counts": {status: counts[status] for status in get_args(Status)},
        "gates": {"float64_rms": SEMANTIC_RMS, "float64_max": SEMANTIC_MAX},
        "forward": _section(report.forward, [check for check in checks if check.name.startswith("forward/")], sites),
        "backward": report.backward
        and _section(report.backward, [check for check in checks if check.name.startswith("backward/")], sites),
        "not_backward": report.not_backward,
        "behaviour": [
            {"name": check.site, "status": check.status, "error": _number(check.exact), "reason": check.reason}
            for check in checks
            if check.name.startswith("behaviour/")
        ],
        "expected_failed_checks": [
            {"pattern": pattern, "reason": report.expected_failed_checks[pattern], **_outcome(checks)}
            for pattern, checks in decided_checks(report).items()
        ],
        "environment": dict(report.environment),
        "notes": list(report.notes),
    }


def _cut(cut: Extent) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cut._asdict().items()}


def _outcome(checks: Sequence[Check]) -> dict[str, int]:
    counts = Counter(check.status for check in checks)
    return {"failed": counts["expected failure"], "stale": counts["stale expectation"]}


def _section(report: ParityReport, checks: Sequence[Check], sites: Collection[str]) -> dict[str, Any]:
    measured = {result.site: result for result in report.results}
    position = {name: k for k, name in enumerate(report.order)}
    failures = report.semantic_failures or report.numerical_failures
    return {
        "what": report.what,
        "objectives": report.objectives,
        "nearby_inputs": report.nearby,
        "passed": all(check.status in ("passed", "not observed", "expected failure") for check in checks),
        "first_divergence": failures[0].site if failures else None,
        "causes": [_cause(cause) for cause in report.causes],
        "next_step": next_step(report),
        "beyond_rounding": report.beyond,
        "place": report.place,
        "hidden": list(report.hidden),
        "alone_precision": "float64" if report.semantic_failures else report.precision,
        "wrong_alone": [{"part": part, "rms": _number(rms)} for part, rms in wrong_alone(report).items()],
        "not_fed": not_fed(report),
        "checks": [
            {
                "name": check.name,
                "site": check.site,
                "kind": _kind(check.site, sites),
                "block": _block(check.site),
                "status": check.status,
                "reason": check.reason,
                "measured": _measured(measured.get(check.site), report.what, report.precision),
            }
            for check in sorted(checks, key=lambda check: position.get(check.site, 0))
        ],
    }


def _measured(result: SiteResult | None, what: str, precision: str) -> dict[str, Any] | None:
    if result is None:
        return None
    numbers = {
        "rounding": result.rounding,
        "reference_error": result.reference_error,
        "gate": result.gate,
        "ratio": result.ratio,
        "margin": result.margin,
    }
    return {
        "exact": _error(result.exact),
        "alone": _error(result.alone),
        # NumPy computes no gradients, so the reference is their only oracle.
        "oracles": _error(result.oracles if what == "sites" else None),
        **{name: _number(value) if result.has_rounding else None for name, value in numbers.items()},
        "incomparable": result.incomparable_in(precision),
        "failure": result.failure(precision),
        "semantic_gate": result.exact.semantic_gate,
        "passes_semantic_gate": result.exact.passes_semantic_gate,
        "passes_numerical_gate": result.passes_numerical_gate,
    }


def _error(error: Error | None) -> dict[str, Any] | None:
    return error and {"rms": _number(error.rms), "max": _number(error.max)}


def _cause(cause: Cause) -> dict[str, Any]:
    errors = {"before": _number(cause.before), "after": _number(cause.after)}
    return {"text": str(cause), "label": cause.label, "site": cause.site, **errors}


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else json.dumps(value)


def _kind(site: str, sites: Collection[str]) -> str:
    if site == "pixels" or site.startswith("input:"):
        return "pixels"
    return "site" if site in sites else "parameter"


def _block(site: str) -> int | None:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    return int(number[1]) if number else None
