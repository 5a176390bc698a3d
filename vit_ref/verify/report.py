"""A parity report as text: the headline with the first divergence, and the table in site order, 80 columns wide."""

from __future__ import annotations

from vit_ref.verify.gates import SEMANTIC_RMS
from vit_ref.verify.parity import ParityReport, SiteResult


def headline(report: ParityReport) -> str:
    """The verdict in a few lines, the first divergence on top."""
    if report.unobserved:
        return f"{report.title}: {len(report.unobserved)} sites were not observed, first {report.unobserved[0]}"
    last = report.results[-1]
    output = f"{last.site}: {last.rounding:.1e}, {last.ratio:,.3g} x {report.reference}'s own {report.precision} error"
    if report.semantic_failures:
        first = report.semantic_failures[0]
        worst = max(report.semantic_failures, key=lambda result: result.exact.rms)
        blame = max(report.semantic_failures, key=lambda result: result.alone.rms)
        return (
            f"{report.title}: first divergence at {first.site}: float64 relative RMS {first.exact.rms:.1e},"
            f" gate {SEMANTIC_RMS:.0e}\n"
            f"  worst: {worst.site} {worst.exact.rms:.1e}; each block fed the reference's input: {blame.site}"
            f" {blame.alone.rms:.1e}\n"
            f"  {output}"
        )
    if report.numerical_failures:
        first = report.numerical_failures[0]
        return (
            f"{report.title}: the formulas agree (float64), the rounding does not: first divergence at {first.site}:"
            f" {report.precision} relative RMS {first.rounding:.1e}, gate {first.gate:.1e}\n"
            f"  {output}"
        )
    exact = max(report.results, key=lambda result: result.exact.rms)
    tight = min(report.results, key=lambda result: result.margin)
    return (
        f"{report.title}: {len(report.results)} sites pass; float64 at most {exact.exact.rms:.1e} ({exact.site}),"
        f" smallest margin {tight.margin:.2f} ({tight.site})\n"
        f"  {output}"
    )


def table(report: ParityReport) -> str:
    """Every site with its errors, in the order of the forward pass."""
    header = (
        f"{'site':<24}{'float64':>9}{'alone':>9}{report.precision:>10}{report.reference:>9}{'ratio':>8}{'margin':>7}"
    )
    return "\n".join([header, *(_row(result) for result in report.results)])


def explain() -> str:
    """What the table's columns are."""
    return (
        "relative RMS errors against the float64 oracle. float64: candidate in float64 (gate"
        f" {SEMANTIC_RMS:.0e});\nalone: the same, each block fed the reference's input; then candidate and reference in"
        " the tested\nprecision, their ratio, and how far under its gate the site is"
    )


def _row(result: SiteResult) -> str:
    failed = not result.exact.passes_semantic_gate, not result.passes_numerical_gate
    mark = {(True, True): "  <- both", (True, False): "  <- float64", (False, True): "  <- rounding"}.get(failed, "")
    return (
        f"{result.site:<24}{result.exact.rms:>9.1e}{result.alone.rms:>9.1e}{result.rounding:>10.1e}"
        f"{result.yardstick:>9.1e}{result.ratio:>8,.3g}{result.margin:>7.2f}{mark}"
    )
