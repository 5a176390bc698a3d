"""Writes the figures of `measure.py` as a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surprises import read_findings

Cell = Callable[[dict[str, Any]], str]


def write_page(measured: dict[str, Any]) -> str:
    """Returns the page in Markdown.

    Args:
        measured: date, processor, minutes, and the figures of each framework by its title.
    """
    figures = measured["figures"]
    parts = [
        "# What frameworks default to",
        f"`docs/frameworks/build.py` measured this page on {measured['date']}, on a CPU ({measured['processor']}), in"
        f" {measured['minutes']:g} minutes. It installs each public release into an environment of its own and runs it."
        " Vector code differs between processors, so the errors of another CPU differ too. A dash means that the"
        " framework has no such operation, or that the script does not ask for it.",
    ]
    for title, text, columns in SECTIONS:
        rows = [[name, *(cell(figure) for cell in columns.values())] for name, figure in figures.items()]
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        parts += [f"## {title}", text, _write_table(["framework", *columns], rows)]
    releases = [[name, figure["version"], figure["python"]] for name, figure in figures.items()]
    parts += [
        "## Releases",
        "In an environment with the release, `python docs/frameworks/measure.py ADAPTER` prints its figures.",
        _write_table(["framework", "release", "Python"], releases),
        "## Surprises",
        "We wrote down a guess before each measurement, and kept those where the guess was wrong. Each script installs"
        " the pinned releases and shows the behaviour; `findings/run` runs all of them.",
    ]
    for finding in read_findings():
        parts += [
            f"### {finding['name']}",
            f"`findings/{finding['name']}.sh`",
            "\n".join(
                f"- {label}: {finding[key]}"
                for label, key in (("Guess", "guess"), ("Seen", "seen"), ("It hurts", "hurts"))
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _write_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_missing(value: Any) -> str | None:
    """Returns the cell of an operation that the framework lacks or refuses, and None for a figure."""
    if value is None:
        return "-"
    return f"raises {value['refused']}" if isinstance(value, dict) and "refused" in value else None


def _plain(key: str) -> Cell:
    return lambda figure: (
        _is_missing(figure[key]) or (f"{figure[key]:g}" if isinstance(figure[key], float) else str(figure[key]))
    )


def _number(key: str, index: int | None = None) -> Cell:
    def cell(figure: dict[str, Any]) -> str:
        missing = _is_missing(figure[key])
        if missing is not None:
            return missing
        value = figure[key] if index is None else figure[key][index]
        return "1 (gives 0)" if value == 1 else f"{value:.1e}"

    return cell


def _units(key: str) -> Cell:
    return lambda figure: _is_missing(figure[key]) or f"{figure[key]:.1f}"


def _resize(key: str, field: str) -> Cell:
    def cell(figure: dict[str, Any]) -> str:
        value = figure[key]
        missing = _is_missing(value)
        if missing is not None:
            return missing
        if value["error"] > 1e-5:
            return f"none of those tried ({value['error']:.0e} off)"
        return {True: "yes", False: "no"}[value[field]] if isinstance(value[field], bool) else str(value[field])

    return cell


def _weight(figure: dict[str, Any]) -> str:
    linear = figure["linear"]
    if linear is None or isinstance(linear[0], str):
        return "-" if linear is None else linear[0]
    return {(3, 5): "(in, out)", (5, 3): "(out, in)"}[tuple(linear[0])]


def _bias(figure: dict[str, Any]) -> str:
    linear = figure["linear"]
    return "-" if linear is None or linear[1] is None else "yes" if linear[1] else "no"


SECTIONS: tuple[tuple[str, str, dict[str, Cell]], ...] = (
    (
        "GELU",
        "The first column is the form that a caller gets who names none. The others are relative errors of the erf"
        " form in float32, against float64. An error of 4 % at -5 is 6e-8 in absolute terms. An absolute tolerance"
        " never sees it; a relative one does. `0.5 * x * (1 + erf(x / sqrt(2)))` loses its digits there, because `1"
        " + erf` cancels.",
        {
            "default form": _plain("gelu_default"),
            "error at -3": _number("gelu_errors", 0),
            "error at -5": _number("gelu_errors", 1),
            "error at -8": _number("gelu_errors", 2),
        },
    ),
    (
        "LayerNorm",
        "The first column is the epsilon that a caller gets who names none. The others are relative RMS errors in"
        " float32 on rows of 256 numbers of deviation 1 and the given mean. The truth is float64 with the same"
        " epsilon and the same float32 numbers. A variance computed as `mean(x**2) - mean(x)**2` cancels when the"
        " mean is large.",
        {
            "epsilon": _plain("epsilon"),
            "mean 0": _number("norm_errors", 0),
            "mean 100": _number("norm_errors", 1),
            "mean 1,000": _number("norm_errors", 2),
            "mean 10,000": _number("norm_errors", 3),
        },
    ),
    (
        "Softmax in half precision",
        "The RMS error of 257 probabilities a row, in units of the dtype's rounding (2**-8 for bfloat16, 2**-11 for"
        " float16). A perfect result, rounded once, errs by 0.3 to 0.4 units. A larger error means that the framework"
        " rounds exponentials or their sum as well.",
        {"bfloat16": _units("softmax_bfloat16"), "float16": _units("softmax_float16")},
    ),
    (
        "Bicubic resize",
        "The resize that explains the framework's default to the last bits of float32: the kernel's coefficient;"
        " what lies outside the image (`clamp` repeats the edge, `renormalise` leaves it out); and whether a"
        " reduction to one half is antialiased.",
        {
            "coefficient": _resize("resize_larger", "a"),
            "border": _resize("resize_larger", "border"),
            "aligned corners": _resize("resize_larger", "align_corners"),
            "antialiased": _resize("resize_smaller", "antialias"),
        },
    ),
    (
        "Linear",
        "How the framework stores the weight, and whether it adds a bias unless the caller refuses one.",
        {"weight": _weight, "bias": _bias},
    ),
    (
        "Fused attention in float64",
        "The relative RMS error of the framework's own attention function on float64 inputs, against NumPy in"
        " float64. An error of 1e-16 is float64. An error of 1e-7 means that the framework computed some of it in"
        " float32, although inputs and output are float64.",
        {"error": _number("attention")},
    ),
)
