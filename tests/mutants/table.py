"""docs/evidence/mutants.md: every mutant, what kills it, and what the customary checks of a port report.

Writes the page again: python -m tests.mutants.table
"""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from tests.helpers.remembered import remembered_references
from tests.mutants.catalogue import MUTANTS
from tests.mutants.direct import operation_by_operation
from tests.mutants.mutant import Mutant, Parity
from tests.mutants.nested import fresh_compiler
from vit_ref.errors import InputError
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES
from vit_ref.verify.gates import error
from vit_ref.verify.references.flax_vit import FlaxViTReference
from vit_ref.verify.vit import hf_tensors
from vit_ref.weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "evidence" / "mutants.md"
TOLERANCES = (0.1, 0.01, 1e-4)
MULTIPLE = "output error / FlaxViT's"
COLUMNS = (
    "bug",
    "seen in",
    "killed by",
    "first site",
    "suggested cause",
    MULTIPLE,
    *(f"max\\|Δ\\| < {tolerance}" for tolerance in TOLERANCES),
    "top-1",
)
PASSES, SEES = "passes", "sees"


class Figures(NamedTuple):
    """The output of the candidate with a mutant in it, in float32.

    Attributes:
      multiple: its error as a multiple of FlaxViT's own; infinite if there is no output to compare.
      difference: largest difference from FlaxViT's output.
      agrees: whether all top-1 classes agree.
    """

    multiple: float
    difference: float
    agrees: bool

    def verdicts(self) -> tuple[str, ...]:
        """Returns the verdict of each customary check."""
        passed = (*(self.difference < tolerance for tolerance in TOLERANCES), self.agrees)
        return tuple(PASSES if each else SEES for each in passed)


def doses() -> list[tuple[Mutant, float | None]]:
    """Returns every mutant that differs from the right model, at every dose."""
    return [(mutant, dose) for mutant in MUTANTS if not mutant.equivalent for dose in mutant.doses or (None,)]


def measure(mutant: Mutant, dose: float | None) -> Figures:
    """Puts the mutant in, and compares the output on the images of its own case, or else on those of "rectangular"."""
    name = mutant.tests.case if isinstance(mutant.tests, Parity) else "rectangular"
    case = CASES[name]
    outputs = _reference(name)
    # A copy, because some mutants write into it.
    source = Checkpoint(Path(name), {key: value.copy() for key, value in _source(name).tensors.items()}, {})
    inject = mutant.inject if dose is None else functools.partial(mutant.inject, dose=dose)
    way = fresh_compiler() if mutant.compiled else operation_by_operation()
    with way, pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(monkeypatch)
        try:
            trace = OwnCandidate(case.config, source).trace(case.images(), precision_of(np.float32))
        except (InputError, ValueError, TypeError):
            return Figures(math.inf, math.inf, agrees=False)
    found = trace.get(outputs.site, np.empty(0))
    if found.shape != outputs.truth.shape:
        return Figures(math.inf, math.inf, agrees=False)
    return Figures(
        error(found, outputs.truth).rms / error(outputs.reference, outputs.truth).rms,
        float(np.abs(found - outputs.reference).max()),
        agrees=bool((found.argmax(-1) == outputs.reference.argmax(-1)).all()),
    )


class _Outputs(NamedTuple):
    site: str
    truth: NDArray
    reference: NDArray


@functools.cache
def _source(name: str) -> Checkpoint:
    return CASES[name].checkpoint()


@functools.cache
def _reference(name: str) -> _Outputs:
    case = CASES[name]
    reference = FlaxViTReference(case.config, hf_tensors(case.config, _source(name)))
    with remembered_references():
        traces = [reference.trace(case.images(), precision_of(dtype)) for dtype in (np.float64, np.float32)]
    site = "logits" if case.config.num_labels else "pooler" if case.config.pooler else "norm"
    return _Outputs(site, traces[0][site], traces[1][site])


def label(mutant: Mutant, dose: float | None) -> str:
    """Returns the mutant's name in the table."""
    return mutant.name if dose is None else f"{mutant.name} ({dose:g})"


def row(mutant: Mutant, dose: float | None, figures: Figures) -> tuple[str, ...]:
    """Returns one line of the table."""
    number = f"{mutant.number}. " if mutant.number else ""
    multiple = "refused" if math.isinf(figures.multiple) else f"{float(f'{figures.multiple:.2g}'):,g}"
    return (
        f"{number}**{label(mutant, dose)}**: {mutant.story}",
        mutant.source,
        mutant.killed_by,
        f"`{mutant.first_site}`" if mutant.first_site else "-",
        mutant.cause_at(dose) or "-",
        multiple,
        *figures.verdicts(),
    )


def summary(count: int, through: list[int]) -> str:
    """Says in one sentence how many of `count` bugs each customary check lets through."""
    *tolerated, top1 = through
    checks = ", ".join(f"`max|Δ| < {bound}` passes {n}" for bound, n in zip(TOLERANCES, tolerated, strict=True))
    return f"This suite lets none of {count} bugs through; {checks}, and top-1 agreement passes {top1}."


def render(figures: list[Figures]) -> str:
    """Returns the whole page."""
    rows = [row(mutant, dose, found) for (mutant, dose), found in zip(doses(), figures, strict=True)]
    lines = [
        "# The catalogue of bugs",
        "",
        "The test suite puts each bug into the candidate, one at a time. The tests of the named marker must fail,",
        "name the first site, and suggest this cause and no other. `python -m tests.mutants.table` writes this page.",
        "A test fails if the page is stale.",
        "",
        "How to read the columns:",
        "",
        "- A number before a bug is its number in our list of bugs from public ports. Brackets hold the dose.",
        "- The columns on the right say what customary checks report, on the same weights and images in float32.",
        "- The error at the output is a multiple of FlaxViT's own error.",
        "- A bound on the largest difference, or top-1 agreement, either sees the bug or passes it.",
        "",
        "The weights are random and their attention is sharp, so these figures flatter the customary checks.",
        "On a trained ViT-S/14 `tanh-gelu` differs by 0.055 at most.",
        "",
        summary(len(rows), [column.count(PASSES) for column in zip(*(f.verdicts() for f in figures), strict=True)]),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        "No input tells these from the truth:",
        "",
        *(f"- **{mutant.name}**: {mutant.story}. {mutant.equivalent}" for mutant in MUTANTS if mutant.equivalent),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render([measure(*each) for each in doses()]), encoding="utf-8")
