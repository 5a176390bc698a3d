"""Is every bug of the catalogue killed, by the tests that should, and named where it is?"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import suite
import table
from catalogue import MUTANTS
from mutant import Mutant

from vit_ref.errors import InputError

pytestmark = pytest.mark.mutants

# What a test fails with that found something wrong. A TypeError, say, would be a clumsy injection.
RIGHT_REASONS = (AssertionError, pytest.fail.Exception, InputError, FloatingPointError)

ALIVE = [mutant for mutant in MUTANTS if not mutant.equivalent]
DOSED = [
    pytest.param(mutant, dose, id=mutant.name if dose is None else f"{mutant.name}-{dose:g}")
    for mutant in ALIVE
    for dose in mutant.doses or (None,)
]


def _suites() -> list[tuple[str, str, str]]:
    """(file, marker, -k expression): all that any mutant runs, each file once."""
    chosen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for mutant in ALIVE:
        file, _, expression = mutant.tests
        chosen[file, mutant.killed_by].add(f"({expression})")
    return [(*key, " or ".join(sorted(expressions))) for key, expressions in chosen.items()]


def _found_something(error: type[BaseException]) -> bool:
    # jax reports a leaked tracer as a plain Exception.
    return issubclass(error, RIGHT_REASONS) or error is Exception


@pytest.mark.parametrize(
    ("file", "marker", "chosen"), [pytest.param(*each, id=Path(each[0]).stem) for each in _suites()]
)
def test_without_a_mutant_the_suite_is_green(file: str, marker: str, chosen: str, tmp_path: Path) -> None:
    outcome = suite.run((file, "-k", chosen), marker, tmp_path)
    assert not outcome.failed, "\n\n".join(failure.text for failure in outcome.failed.values())
    assert outcome.passed


@pytest.mark.parametrize(("mutant", "dose"), DOSED)
def test_a_mutant_is_killed_and_named_where_it_is(
    mutant: Mutant, dose: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inject = mutant.inject if dose is None else functools.partial(mutant.inject, dose=dose)
    inject(monkeypatch)
    outcome = suite.run(mutant.tests, mutant.killed_by, tmp_path)
    monkeypatch.undo()
    assert outcome.failed, f"{mutant.name} survives: {mutant.story}"
    text = "\n\n".join(failure.text for failure in outcome.failed.values())
    wrong = [failure.error for failure in outcome.failed.values() if not _found_something(failure.error)]
    assert not wrong, f"killed by a clumsy injection, {wrong}:\n{text}"
    if mutant.first_site:
        assert mutant.says.format(site=mutant.first_site) in text, text
    suggested = set(re.findall(r"likely cause: (.*): with it the error", text))
    cause = mutant.cause_at(dose)
    assert suggested == ({cause} if cause else set()), text


def test_every_bug_that_was_seen_is_in_the_catalogue_once() -> None:
    numbers = Counter(mutant.number for mutant in MUTANTS if mutant.number is not None)
    assert numbers == Counter(range(1, 51))


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(("mutant", "dose"), DOSED)
def test_the_table_is_not_stale(mutant: Mutant, dose: float | None) -> None:
    expected = table.row(mutant, dose, table.measure(mutant, dose))
    written = [line for line in table.PATH.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in written]
    [found] = [row for row in rows if f"**{table.label(mutant, dose)}**" in row[0]]
    column = table.COLUMNS.index(table.MULTIPLE)
    multiple, shown = expected[column], found[column]
    # Another processor or jax rounds otherwise; what is right stays about 1, what is wrong far from it.
    assert shown == multiple or 0.5 < float(shown.replace(",", "")) / float(multiple.replace(",", "")) < 2
    assert found[:column] + found[column + 1 :] == expected[:column] + expected[column + 1 :]


def test_the_table_and_the_readme_have_the_totals() -> None:
    written = table.PATH.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in written.splitlines() if "**" in line and line.startswith("| ")]
    assert len(rows) == len(DOSED)
    first = table.COLUMNS.index(table.MULTIPLE) + 1
    through = [
        sum(row[first + k].removesuffix(" |") == table.PASSES for row in rows) for k in range(len(table.TOLERANCES) + 1)
    ]
    totals = table.summary(len(rows), through)
    assert totals in written
    assert totals in " ".join((suite.ROOT / "README.md").read_text(encoding="utf-8").split())
