"""Reports as text: headline and summary with the first divergence on top, and the table in site order."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from vit_ref.model.sites import OUTPUTS
from vit_ref.verify.gates import SEMANTIC_RMS, apart
from vit_ref.verify.results import NEVER_SHOWN, CandidateReport, Check, ParityReport, SiteResult, Status, matches

WIDTH = 80
# An output that errs so many times as much as the final norm has a fault of its own.
_FAR = 10
# What to do where a port was to compute in float64 and rounds.
ROUNDING = "rounding is no wrong formula: compute in the dtype that load(checkpoint, dtype) is told"
# A row of the table ends with one of these where it fails: both gates, the semantic or the numerical one.
MARKS = ("both", "float64", "rounding")


def headline(report: ParityReport) -> str:
    """The verdict in a few lines, the first divergence on top."""
    missing = [
        f"{report.title}: {_counted(len(report.unobserved), report.what)} not observed, first {site}: {NEVER_SHOWN}"
        for site in report.unobserved[:1]
    ]
    if missing and not (report.semantic_failures or report.numerical_failures):
        return missing[0]
    unmapped = (
        [f"not observed: {_counted(len(report.unmapped), report.what)}: {_some(_parameters_first(report.unmapped))}"]
        if report.unmapped
        else []
    )
    last = report.results[-1]
    multiple = f"{last.rounding:.1e}, {_multiple(last.ratio)} x {report.reference}'s own {report.precision} error"
    output = f"{last.site}: {last.incomparable_in(report.precision) or multiple}"
    if report.semantic_failures:
        first = report.semantic_failures[0]
        worst = max(report.semantic_failures, key=lambda result: result.exact.rms)
        verdict = (
            f"{report.title}: first divergence at {first.site}: {first.failure(report.precision)}; worst"
            f" {worst.exact.reason or f'{worst.exact.rms:.1e}'} at {worst.site}"
        )
    elif report.numerical_failures:
        first = report.numerical_failures[0]
        verdict = (
            f"{report.title}: the formulas agree (float64), the rounding does not: first divergence at {first.site}:"
            f" {first.failure(report.precision)}"
        )
    else:
        exact = max(report.results, key=lambda result: result.exact.rms)
        over = f" over {report.objectives} objectives" if report.objectives else ""
        tight = min(report.results, key=lambda result: result.margin)
        verdict = (
            f"{report.title}: {_counted(len(report.results), report.what)} pass{over}; float64 at most"
            f" {exact.exact.rms:.1e} ({exact.site}), smallest margin {tight.margin:.2f} ({tight.site})"
        )
    hidden = [f"not shown right before it, where it may have begun: {_some(report.hidden)}"] if report.hidden else []
    place = [f"wrong {report.place}"] if report.place else []
    causes = [f"likely cause: {cause}" for cause in report.causes]
    rounding = [ROUNDING] if report.semantic_failures and any(cause.format for cause in report.causes) else []
    beyond = [f"this rounding does not explain what follows: {report.beyond}"] if report.beyond else []
    found = "\n  ".join([verdict, output, *unmapped, *hidden, *place, *causes, *rounding, *beyond, *_blame(report)])
    return "\n".join([*missing, found])


def _blame(report: ParityReport) -> list[str]:
    """Every part that is wrong by itself; blocks that go wrong at the same site count as one."""
    if report.everywhere:
        return _blame_sites(report)
    guilty, groups = wrong_alone(report), dict[str, list[str]]()
    for result in report.results:
        part = _part(result.site)
        wrong = result.alone is not None and result.alone.rms > _gate_alone(result, report)
        if wrong and part in guilty and not any(part in parts for parts in groups.values()):
            groups.setdefault(result.site.removeprefix(f"{part}."), []).append(part)
    said = []
    for site, parts in groups.items():
        names = parts[0] if len(parts) == 1 else f"{len(parts)} blocks, {_listed_blocks(parts)},"
        since = f" from {site} on" if site != parts[0] else ""
        worst = max(guilty[part] for part in parts)
        said.append(f"{names}{since} {f'{worst:.1e}' if math.isfinite(worst) else 'not comparable'}")
    return [f"fed the reference's input, wrong by itself: {'; '.join(said)}"] if said else []


def _blame_sites(report: ParityReport) -> list[str]:
    """Every site that is wrong by itself; those that differ in their first number count as one."""
    guilty, groups = wrong_alone(report), dict[str, list[str]]()
    for site in guilty:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "{i}", site, count=1), []).append(site)
    said = []
    for template, several in groups.items():
        names = several[0] if len(several) == 1 else f"{template} ({len(several)} times)"
        worst = max(guilty[site] for site in several)
        said.append(f"{names} {f'{worst:.1e}' if math.isfinite(worst) else 'not comparable'}")
    return [f"fed the reference's values before it, wrong by itself: {'; '.join(said)}"] if said else []


def _listed_blocks(parts: list[str]) -> str:
    numbers = [int(part.rpartition(".")[2]) for part in parts]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _part(site: str) -> str:
    return ".".join(site.split(".")[:2]) if site.startswith("block.") else site


def _gate_alone(result: SiteResult, report: ParityReport) -> float:
    return SEMANTIC_RMS if report.semantic_failures else result.gate


def wrong_alone(report: ParityReport) -> dict[str, float]:
    """Which blocks, or sites outside them, are at fault when each block is fed the reference's input.

    Returns:
      The largest relative RMS error in each: of all beyond the semantic gate, in order; where the formulas agree, of
      those beyond the numerical one, the worst first. The embeddings are at fault where the patches are not, and the
      output where the final norm is not or errs far less: nobody can feed them the reference's.
    """
    worst: dict[str, float] = {}
    for result in report.results:
        if result.alone is None or result.alone.rms <= _gate_alone(result, report):
            continue
        if report.everywhere:
            worst[result.site] = result.alone.rms
            continue
        inherited = {"embeddings": worst.get("patches"), **dict.fromkeys(OUTPUTS, worst.get("norm"))}.get(result.site)
        if inherited and (result.site == "embeddings" or result.alone.rms < _FAR * inherited):
            continue
        part = _part(result.site)
        worst[part] = max(worst.get(part, 0.0), result.alone.rms)
    return worst if report.semantic_failures else dict(sorted(worst.items(), key=lambda item: -item[1]))


def summary(report: CandidateReport) -> str:
    """A whole report in a few lines of 80 columns.

    The headlines come first, forward before backward. Every paragraph after them begins with its status, as `Check` has
    it, or with "note" where there is one of the environment. The last line is the verdict, and begins with PASSED or
    FAILED.
    """
    lines = [line for paragraph in _paragraphs(report) for line in _wrapped(paragraph)]
    verdict = "PASSED" if report.passed else "FAILED"
    judged = f"{report.candidate} on {report.title} against {report.reference}, {report.precision}"
    return "\n".join([*lines, f"{verdict}: {judged}"])


def _paragraphs(report: CandidateReport) -> Iterator[str]:
    yield from headline(report.forward).splitlines()
    if report.backward is not None:
        yield from headline(report.backward).splitlines()
    for check in report.checks:
        if check.name.startswith("behaviour/") and check.status == "failed":
            yield f"failed: {check.name}: {check.reason}"
    parts = [part for part in (report.forward, report.backward) if part]
    hidden = [_counted(len(part.unmapped), part.what) for part in parts if part.unmapped]
    if report.backward is None:
        hidden.append(f"gradients ({report.not_backward})")
    if report.not_behaviour:
        hidden.append(f"behaviour ({report.not_behaviour})")
    if hidden:
        yield f"not observed: {', '.join(hidden)}"
    for pattern, checks in met(report).items():
        for status in ("expected failure", "stale expectation"):
            if names := tuple(check.name for check in checks if check.status == status):
                yield f"{status}: {pattern}: {report.expected_failed_checks[pattern]}: {len(names)}: {_some(names)}"
    for note in (*report.notes, *filter(None, [report.environment.get("note")])):
        yield f"note: {note}"
    yield f"weights: {report.checkpoint.said}"
    counts = Counter(check.status for check in report.checks)
    yield f"checks: {', '.join(f'{counts[status]} {status}' for status in get_args(Status) if counts[status])}"


def met(report: CandidateReport) -> dict[str, list[Check]]:
    """What each expectation decided: the checks that it means, and no pattern before it does."""
    decided: dict[str, list[Check]] = {pattern: [] for pattern in report.expected_failed_checks}
    for check in report.checks:
        if check.status in ("expected failure", "stale expectation"):
            decided[next(pattern for pattern in decided if matches(pattern, check))].append(check)
    return decided


def _counted(number: int, what: str) -> str:
    return f"{number} {what.removesuffix('s') if number == 1 else what}"


def _wrapped(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, WIDTH, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)


def table(report: ParityReport) -> str:
    """Every site with its errors, in the order of the forward pass."""
    alone = any(result.alone for result in report.results)
    width = max([len(report.what), *(len(result.site) for result in report.results)]) + 1
    column = max(10, len(report.precision) + 1)
    header = (
        f"{report.what:<{width}}{'float64':>9}{'alone' if alone else '':>{9 * alone}}{report.precision:>{column}}"
        f"{report.reference:>9}{'ratio':>8}{'margin':>8}"
    )
    return "\n".join([header, *(_row(result, width, alone, column) for result in report.results)])


def excerpt(report: ParityReport, rows: int = 8) -> str:
    """The table around the first divergence: two rows before it, and what follows, `rows` in all."""
    header, *lines = table(report).splitlines()
    failing = [not (result.exact.passes_semantic_gate and result.passes_numerical_gate) for result in report.results]
    start = max(failing.index(True) - 2, 0) if any(failing) else 0
    shown = lines[start : start + rows]
    return "\n".join(
        [header, *shown, f"... {len(lines) - len(shown)} more" if len(lines) > len(shown) else ""]
    ).rstrip()


def explain() -> str:
    """What the table's columns are."""
    return (
        f"Relative RMS errors against the float64 oracle. float64: the candidate in float64 (gate {SEMANTIC_RMS:.0e});"
        " then the candidate\nand the reference in the tested precision, their ratio, and the margin under the gate"
        " (below 1 fails).\nalone: the candidate with each block fed the reference's input, shown where something"
        " failed."
    )


def _row(result: SiteResult, width: int, with_alone: bool, column: int) -> str:
    failed = not result.exact.passes_semantic_gate, not result.passes_numerical_gate
    both, exact, rounding = MARKS
    mark = {(True, True): f" {both}", (True, False): f" {exact}", (False, True): f" {rounding}"}.get(failed, "")
    alone = (f"{result.alone.rms:>9.1e}" if result.alone else f"{'':>9}") if with_alone else ""
    return (
        f"{result.site:<{width}}{result.exact.rms:>9.1e}{alone}{result.rounding:>{column}.1e}"
        f"{result.reference_error:>9.1e}"
        f"{_multiple(result.ratio):>8}{apart(result.margin, 1.0, 2, 'g')[0]:>8}{mark}"
    )


def _parameters_first(names: tuple[str, ...]) -> tuple[str, ...]:
    """A parameter that a port has not cannot learn; a value that it does not show may be right all the same."""
    alone = ("cls_token", "position_embeddings")
    return tuple(sorted(names, key=lambda name: name.startswith("block.") or ("." not in name and name not in alone)))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _multiple(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
