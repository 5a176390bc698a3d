"""A parity report as text: the headline with the first divergence, and the table in site order, 80 columns wide."""

from __future__ import annotations

from vit_ref.verify.gates import SEMANTIC_RMS
from vit_ref.verify.parity import ParityReport, SiteResult


def headline(report: ParityReport) -> str:
    """The verdict in a few lines, the first divergence on top."""
    if report.unobserved:
        return f"{report.title}: {len(report.unobserved)} {report.what} were not observed, first {report.unobserved[0]}"
    unmapped = (
        [f"not observed: {len(report.unmapped)} {report.what}: {_some(report.unmapped)}"] if report.unmapped else []
    )
    last = report.results[-1]
    output = (
        f"{last.site}: {last.rounding:.1e}, {_multiple(last.ratio)} x {report.reference}'s own {report.precision} error"
    )
    if report.semantic_failures:
        first = report.semantic_failures[0]
        worst = max(report.semantic_failures, key=lambda result: result.exact.rms)
        verdict = (
            f"{report.title}: first divergence at {first.site}: float64 relative RMS {first.exact.rms:.1e},"
            f" gate {SEMANTIC_RMS:.0e}; worst {worst.exact.rms:.1e} at {worst.site}"
        )
    elif report.numerical_failures:
        first = report.numerical_failures[0]
        verdict = (
            f"{report.title}: the formulas agree (float64), the rounding does not: first divergence at {first.site}:"
            f" {report.precision} relative RMS {first.rounding:.1e}, gate {first.gate:.1e}"
        )
    else:
        exact = max(report.results, key=lambda result: result.exact.rms)
        tight = min(report.results, key=lambda result: result.margin)
        verdict = (
            f"{report.title}: {len(report.results)} {report.what} pass; float64 at most {exact.exact.rms:.1e}"
            f" ({exact.site}), smallest margin {tight.margin:.2f} ({tight.site})"
        )
    hidden = [f"not shown right before it, where it may have begun: {_some(report.hidden)}"] if report.hidden else []
    place = [f"wrong only at {report.place}"] if report.place else []
    causes = [f"likely cause: {cause}" for cause in report.causes]
    return "\n  ".join([verdict, output, *unmapped, *hidden, *place, *causes, *_blame(report)])


def _blame(report: ParityReport) -> list[str]:
    """Which blocks are at fault when each is fed the reference's input: one line, where anything failed."""
    worst: dict[str, float] = {}
    for result in report.results:
        if result.alone is None:
            continue
        part = ".".join(result.site.split(".")[:2]) if result.site.startswith("block.") else result.site
        worst[part] = max(worst.get(part, 0.0), result.alone.rms)
    if report.semantic_failures:
        guilty = [part for part, rms in worst.items() if rms > SEMANTIC_RMS]
    else:
        guilty = sorted(worst, key=lambda part: -worst[part])[:3]
    if not guilty:
        return []
    shown = ", ".join(f"{part} {worst[part]:.1e}" for part in guilty[:3])
    return [f"fed the reference's input, wrong by itself: {shown}{', ...' if len(guilty) > 3 else ''}"]


def table(report: ParityReport) -> str:
    """Every site with its errors, in the order of the forward pass."""
    alone = any(result.alone for result in report.results)
    width = max(len(result.site) for result in report.results) + 1
    header = (
        f"{report.what:<{width}}{'float64':>9}{'alone' if alone else '':>{9 * alone}}{report.precision:>10}"
        f"{report.reference:>9}{'ratio':>8}{'margin':>8}"
    )
    return "\n".join([header, *(_row(result, width, alone) for result in report.results)])


def explain() -> str:
    """What the table's columns are."""
    return (
        f"Relative RMS errors against the float64 oracle. float64: the candidate in float64 (gate {SEMANTIC_RMS:.0e});"
        " then the candidate\nand the reference in the tested precision, their ratio, and the margin under the gate"
        " (below 1 fails).\nalone: the candidate with each block fed the reference's input, shown where something"
        " failed."
    )


def _row(result: SiteResult, width: int, with_alone: bool) -> str:
    failed = not result.exact.passes_semantic_gate, not result.passes_numerical_gate
    mark = {(True, True): " both", (True, False): " float64", (False, True): " rounding"}.get(failed, "")
    alone = (f"{result.alone.rms:>9.1e}" if result.alone else f"{'':>9}") if with_alone else ""
    return (
        f"{result.site:<{width}}{result.exact.rms:>9.1e}{alone}{result.rounding:>10.1e}{result.yardstick:>9.1e}"
        f"{_multiple(result.ratio):>8}{result.margin:>8.2g}{mark}"
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _multiple(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
