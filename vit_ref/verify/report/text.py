"""Writes reports as text: the headline and the summary begin with the first divergence, the table is in site order."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import get_args

from vit_ref.model.sites import OUTPUTS
from vit_ref.verify.gates import SEMANTIC_RMS, apart
from vit_ref.verify.results import NEVER_SHOWN, CandidateReport, Check, ParityReport, SiteResult, Status, matches

WIDTH = 80
# An output whose error is this many times that of the final norm has a fault of its own.
_FAR = 10
# With more entries than this, sites that are wrong alone are put together if they differ in their numbers alone.
_ENTRIES = 8
# A row of the table that fails ends with one of these: it fails both gates, the semantic one or the numerical one.
MARKS = ("both", "float64", "rounding")


def headline(report: ParityReport, *, advise: bool = True) -> str:
    """Returns the verdict in a few lines: the first divergence, its likely cause and the next step come first.

    Args:
      report: the forward or the backward pass.
      advise: whether to name the next step.
    """
    claimed = f"claimed {report.what}"
    missing = [
        f"{report.title}: {_counted(len(report.unobserved), claimed)} not shown, first {site}: {NEVER_SHOWN}"
        for site in report.unobserved[:1]
    ]
    step = [f"next step: {next_step(report)}"] if advise and not report.passed else []
    if missing and not (report.semantic_failures or report.numerical_failures):
        return "\n  ".join([*missing, *step])
    last = report.results[-1]
    multiple = f"{_multiple(last.ratio)} x {report.reference}'s error"
    size = f"{report.precision} error {last.rounding:.1e}, {multiple}"
    if not last.has_rounding:
        size = f"float64 error {last.exact.rms:.1e}; {report.precision} rounding not measured"
    output = last.incomparable_in(report.precision) or size
    causes = [f"likely cause: {cause}" for cause in report.causes]
    place = [f"wrong {report.place}"] if report.place else []
    hidden = [f"the fault may begin earlier, at sites not observed: {_some(report.hidden)}"] if report.hidden else []
    beyond = [f"rounding does not explain a later divergence: {report.beyond}"] if report.beyond else []
    unmapped = (
        [f"not observed: {_counted(len(report.unmapped), report.what)}: {_some(_parameters_first(report.unmapped))}"]
        if report.unmapped
        else []
    )
    lines = [_verdict(report), *causes, *step, *place, *hidden, *beyond, *_blame(report)]
    lines += [f"{last.site}: {output}", *unmapped]
    return "\n".join([*missing, "\n  ".join(lines)])


def _verdict(report: ParityReport) -> str:
    if report.semantic_failures:
        first = report.semantic_failures[0]
        worst = max(report.semantic_failures, key=lambda result: result.exact.rms)
        size = f"; worst {worst.exact.rms:.1e} at {worst.site}"
        if worst.exact.reason:  # instead of a size
            size = "" if worst is first else f"; worst at {worst.site}: {worst.exact.reason}"
        return f"{report.title}: first divergence at {first.site}: {first.failure(report.precision)}{size}"
    if report.numerical_failures:
        first = report.numerical_failures[0]
        return (
            f"{report.title}: the formulas agree in float64, but {report.precision} rounding is too large: first"
            f" divergence at {first.site}: {first.failure(report.precision)}{_nearby(report)}"
        )
    exact = max(report.results, key=lambda result: result.exact.rms)
    over = f" over {report.objectives} objectives" if report.objectives else _nearby(report)
    tight = min(report.results, key=lambda result: result.margin)
    wide = f" (gate {exact.exact.semantic_gate:.1e} there)" if exact.exact.semantic_gate > SEMANTIC_RMS else ""
    return (
        f"{report.title}: {_counted(len(report.results), report.what)} pass{'es' if len(report.results) == 1 else ''}"
        f"{over}: largest float64 error {exact.exact.rms:.1e} at {exact.site}{wide}, smallest margin {tight.margin:.2f}"
        f" at {tight.site}"
    )


def _nearby(report: ParityReport) -> str:
    return f", rounding of the given inputs and {report.nearby} nearby ones" if report.nearby else ""


def next_step(report: ParityReport) -> str:
    """Returns what to do about the first divergence, or about claimed sites that never appeared; "" after a pass."""
    failures = report.semantic_failures or report.numerical_failures
    if not failures:
        return "show them through a tap, or remove them from the candidate's sites" if report.unobserved else ""
    site = failures[0].site
    if report.semantic_failures and any(cause.format for cause in report.causes):
        return (
            "this is rounding, not a wrong formula: make the candidate compute in the dtype that"
            " load(checkpoint, dtype) receives"
        )
    if report.what == "gradients" and not report.causes:
        return (
            f"correct the forward pass first if it fails; else look for a stopped or custom gradient right after {site}"
        )
    if report.causes:
        return f"look for this cause in the candidate's code that makes {site}"
    if report.numerical_failures and not report.semantic_failures:
        return f"look for a cast, a dtype or a matrix product below {report.precision} at {site}"
    if never := [each for each in report.hidden if each in report.unobserved]:
        return f"show {_some(never)}, to find where the fault begins: the candidate's sites name it, but never call it"
    if report.hidden:
        return (
            f"add {_some(report.hidden)} to the candidate's sites, to find where the fault begins; vit-ref propose"
            " lists them"
        )
    return f"compare the candidate's code at {site} with the reference's: the values before it agree, this one does not"


def _blame(report: ParityReport) -> list[str]:
    """Names every part that is wrong by itself. Blocks that go wrong at the same site share one entry."""
    if report.everywhere:
        return _blame_sites(report)
    guilty, groups = wrong_alone(report), dict[str, list[str]]()
    for result in report.results:
        part = _part(result.site)
        wrong = result.alone is not None and result.alone.rms > _gate_alone(result, report)
        if wrong and part in guilty and not any(part in parts for parts in groups.values()):
            groups.setdefault(result.site.removeprefix(f"{part}."), []).append(part)
    entries = []
    for site, parts in groups.items():
        names = _named(parts)
        since = f" from {site} on" if site != parts[0] else ""
        worst = max(guilty[part] for part in parts)
        entries.append(f"{names}{since} ({f'{worst:.1e}' if math.isfinite(worst) else 'not comparable'})")
    lines = [f"wrong even with the reference's input: {'; '.join(entries)}"] if entries else []
    if unfed := not_fed(report):
        blocks = [part for part in unfed if part.startswith("block.")]
        others = [part for part in unfed if part not in blocks]
        said = ", ".join([_named(blocks), *others] if blocks else others)
        lines.append(f"the reference's input could not be fed to parts that differ: {said}")
    return lines


def _blame_sites(report: ParityReport) -> list[str]:
    """Returns a line with every site that is wrong alone. Sites that differ only in one number share an entry.

    If that makes many entries, sites that differ in any number share one.
    """
    guilty, groups = wrong_alone(report), dict[str, list[str]]()
    for site in guilty:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "{i}", site, count=1), []).append(site)
    if len(groups) > _ENTRIES:
        groups = {}
        for site in guilty:
            groups.setdefault(re.sub(r"\d+", "{i}", site), []).append(site)
    said = []
    for template, several in groups.items():
        names = several[0] if len(several) == 1 else f"{template}, {len(several)} times"
        worst = max(guilty[site] for site in several)
        said.append(f"{names} ({f'{worst:.1e}' if math.isfinite(worst) else 'not comparable'})")
    lines = [f"wrong even with the reference's values before it: {'; '.join(said)}"] if said else []
    if unfed := not_fed(report):
        lines.append(f"the reference's values could not be fed before sites that differ: {_some(unfed)}")
    return lines


def _named(parts: list[str]) -> str:
    """Returns the name of a part, or of several blocks, such as "blocks 1 to 3"."""
    if len(parts) == 1:
        return parts[0]
    numbers = [int(part.rpartition(".")[2]) for part in parts]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"blocks {numbers[0]} to {numbers[-1]}"
    return f"blocks {', '.join(map(str, numbers))}"


def _part(site: str) -> str:
    return ".".join(site.split(".")[:2]) if site.startswith("block.") else site


def _gate_alone(result: SiteResult, report: ParityReport) -> float:
    return SEMANTIC_RMS if report.semantic_failures else result.gate


def wrong_alone(report: ParityReport) -> dict[str, float]:
    """Returns which parts are wrong even when each block is fed the reference's input.

    Returns:
      The largest relative RMS error of each part, which is a block or a site outside the blocks. If the semantic gate
      failed, these are all parts beyond it, in order. Otherwise these are the parts beyond the numerical gate, the
      worst first. The embeddings and the output cannot be fed the reference's input. The embeddings are left out if
      the patches are wrong already. The output is left out if the final norm is wrong and errs about as much.
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


def not_fed(report: ParityReport) -> list[str]:
    """Returns the wrong parts that could not be fed the reference's input, see `wrong_alone`.

    The candidate does not show the value that enters such a part, or the value cannot be replaced. Nothing is known of
    that part alone.

    Args:
      report: the forward or the backward pass.
    """
    wrong = report.semantic_failures or report.numerical_failures
    part_of = str if report.everywhere else _part
    fed = {part_of(result.site) for result in report.results if result.alone is not None}
    return list(dict.fromkeys(part for result in wrong if (part := part_of(result.site)) not in fed)) if fed else []


def summary(report: CandidateReport) -> str:
    """Returns a whole report in a few lines of 80 columns.

    The headlines come first, forward before backward. Each paragraph after them begins with a status of `Check`, or
    with "note", "weights" or "checks". The last line is the verdict and begins with PASSED or FAILED.
    """
    return "\n".join([*sections(report), closing(report)])


def in_full(report: CandidateReport) -> str:
    """Returns the summary, with each pass's table above its headline.

    Args:
      report: what `check_port` returned.
    """
    return "\n".join([*sections(report, whole=True), closing(report)])


def sections(report: CandidateReport, *, whole: bool = False) -> list[str]:
    """Returns one text for each pass that was measured, forward before backward. `closing` goes below them.

    The text of a pass depends on no later pass, so it can be printed as soon as the pass was measured.

    Args:
      report: what `check_port` returned, or what it handed to `on_part`.
      whole: whether to put the table of the pass above its headline.
    """
    # A wrong forward pass makes gradients wrong: there is one next step then.
    passes = [(report.forward, True)]
    passes += [(report.backward, report.forward.passed)] if report.backward else []
    texts = []
    for part, advise in passes:
        text = _folded(headline(part, advise=advise).splitlines())
        texts.append(f"{table(part)}\n\n{text}\n" if whole else text)
    return texts


def closing(report: CandidateReport) -> str:
    """Returns the end of a report, below the passes: behaviour, what was not observed, notes, and the verdict.

    Args:
      report: what `check_port` returned.
    """
    verdict = "PASSED" if report.passed else "FAILED"
    subject = f"{report.candidate} on {report.title} against {report.reference}, {report.precision}"
    return "\n".join([_folded(_closing_paragraphs(report)), f"{verdict}: {subject}"])


def _folded(paragraphs: Iterable[str]) -> str:
    return "\n".join(line for paragraph in paragraphs for line in _wrapped(paragraph))


def _closing_paragraphs(report: CandidateReport) -> Iterator[str]:
    for check in report.checks:
        if check.name.startswith("behaviour/") and check.status == "failed":
            yield f"failed: {check.name}: {check.reason}"
    parts = [part for part in (report.forward, report.backward) if part]
    hidden = [_counted(len(part.unmapped), part.what) for part in parts if part.unmapped]
    if not report.forward.has_rounding:
        hidden.append(f"{report.precision} rounding (not run: the formula is wrong in float64)")
    if report.backward is None:
        hidden.append(f"gradients ({report.not_backward})")
    if report.not_behaviour:
        hidden.append(f"behaviour ({report.not_behaviour})")
    if hidden:
        yield f"not observed: {', '.join(hidden)}"
    for pattern, checks in decided_checks(report).items():
        for status in ("expected failure", "stale expectation"):
            if names := tuple(check.name for check in checks if check.status == status):
                count = _counted(len(names), "checks")
                remedy = "" if status == "expected failure" else ": remove the expectation, it passes"
                yield f"{status}: {pattern}: {report.expected_failed_checks[pattern]}: {count}: {_some(names)}{remedy}"
    for note in (*report.notes, *filter(None, [report.environment.get("note")])):
        yield f"note: {note}"
    yield f"weights: {report.checkpoint.said}"
    counts = Counter(check.status for check in report.checks)
    yield f"checks: {', '.join(f'{counts[status]} {status}' for status in get_args(Status) if counts[status])}"


def decided_checks(report: CandidateReport) -> dict[str, list[Check]]:
    """Returns the checks that each expectation decided. A check belongs to the first pattern that matches it."""
    checks_of: dict[str, list[Check]] = {pattern: [] for pattern in report.expected_failed_checks}
    for check in report.checks:
        if check.status in ("expected failure", "stale expectation"):
            checks_of[next(pattern for pattern in checks_of if matches(pattern, check))].append(check)
    return checks_of


def _counted(number: int, what: str) -> str:
    return f"{number} {what.removesuffix('s') if number == 1 else what}"


def _wrapped(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, WIDTH, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)


def table(report: ParityReport) -> str:
    """Returns the table of every site with its errors, in the order of the pass."""
    alone = any(result.alone for result in report.results)
    width = max([len(report.what), *(len(result.site) for result in report.results)]) + 1
    column = max(10, len(report.precision) + 1)
    header = (
        f"{report.what:<{width}}{'float64':>9}{'alone' if alone else '':>{9 * alone}}{report.precision:>{column}}"
        f"{report.reference:>9}{'ratio':>8}{'margin':>8}"
    )
    return "\n".join([header, *(_row(result, width, alone, column) for result in report.results)])


def excerpt(report: ParityReport, rows: int = 8) -> str:
    """Returns the part of the table around the first divergence.

    Args:
      report: the forward or the backward pass.
      rows: how many rows to show, of which two are before the divergence.
    """
    header, *lines = table(report).splitlines()
    failing = [not (result.exact.passes_semantic_gate and result.passes_numerical_gate) for result in report.results]
    start = max(failing.index(True) - 2, 0) if any(failing) else 0
    shown = lines[start : start + rows]
    return "\n".join(
        [header, *shown, f"... {len(lines) - len(shown)} more" if len(lines) > len(shown) else ""]
    ).rstrip()


def explain() -> str:
    """Returns the legend of the table."""
    return (
        "Each number is a relative RMS error against the float64 oracle. The columns are:\n"
        f"  float64: the candidate in float64, gate {SEMANTIC_RMS:.0e}, or wider if float32 loses most digits\n"
        "  alone: the candidate when each block is fed the reference's input, measured if something failed\n"
        "  then the candidate and the reference in the tested precision, and the ratio of the two\n"
        "  margin: gate over error; a margin below 1 fails\n"
        "  -: not measured, because a wrong formula ended the run"
    )


def _row(result: SiteResult, width: int, with_alone: bool, column: int) -> str:
    failed = not result.exact.passes_semantic_gate, not result.passes_numerical_gate
    both, exact, rounding = MARKS
    mark = {(True, True): f" {both}", (True, False): f" {exact}", (False, True): f" {rounding}"}.get(failed, "")
    alone = (f"{result.alone.rms:>9.1e}" if result.alone else f"{'':>9}") if with_alone else ""
    if not result.has_rounding:
        return f"{result.site:<{width}}{result.exact.rms:>9.1e}{alone}{'-':>{column}}{'-':>9}{'-':>8}{'-':>8}{mark}"
    return (
        f"{result.site:<{width}}{result.exact.rms:>9.1e}{alone}{result.rounding:>{column}.1e}"
        f"{result.reference_error:>9.1e}"
        f"{_multiple(result.ratio):>8}{apart(result.margin, 1.0, 2, 'g')[0]:>8}{mark}"
    )


def _parameters_first(names: tuple[str, ...]) -> tuple[str, ...]:
    """Sorts parameters to the front: a missing parameter cannot learn, a value that is not shown may still be right."""
    alone = ("cls_token", "position_embeddings")
    return tuple(sorted(names, key=lambda name: name.startswith("block.") or ("." not in name and name not in alone)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _multiple(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
