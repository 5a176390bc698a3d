"""Does docs/evidence/mutants.md agree with the catalogue and its outcomes?"""

from __future__ import annotations

import pytest

from tests.mutants import table
from tests.mutants.killing import ALIVE, dosed
from tests.mutants.mutant import Mutant

# What is run with a fault in it, other tests run without: to measure it here would take a tenth of the time.
pytestmark = pytest.mark.no_cover


@dosed(ALIVE)
def test_the_table_is_not_stale(mutant: Mutant, dose: float | None) -> None:
    expected = table.row(mutant, dose, table.measure(mutant, dose))
    written = [line for line in table.PATH.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in written]
    [found] = [row for row in rows if f"**{table.label(mutant, dose)}**" in row[0]]
    column = table.COLUMNS.index(table.MULTIPLE)
    multiple, shown = expected[column], found[column]
    # Another processor or jax rounds differently. A right model stays near 1, and a wrong one far from it.
    assert shown == multiple or 0.5 < float(shown.replace(",", "")) / float(multiple.replace(",", "")) < 2
    assert found[:column] + found[column + 1 :] == expected[:column] + expected[column + 1 :]


def test_the_table_and_the_readme_have_the_totals() -> None:
    written = table.PATH.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in written.splitlines() if "**" in line and line.startswith("| ")]
    assert len(rows) == len(table.doses())
    first = table.COLUMNS.index(table.MULTIPLE) + 1
    through = [
        sum(row[first + k].removesuffix(" |") == table.PASSES for row in rows) for k in range(len(table.TOLERANCES) + 1)
    ]
    totals = table.summary(len(rows), through)
    assert totals in written
    assert totals in " ".join((table.ROOT / "README.md").read_text(encoding="utf-8").split())
