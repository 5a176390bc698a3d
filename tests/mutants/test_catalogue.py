"""Do the intended tests kill every bug that parity cannot see, and name its site?"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.mutants import nested
from tests.mutants.catalogue import MUTANTS
from tests.mutants.killing import ALIVE, dosed, require_killed
from tests.mutants.mutant import Mutant, Parity

# What is run with a fault in it, other tests run without: to measure it here would take a tenth of the time.
pytestmark = pytest.mark.no_cover

NESTED = [mutant for mutant in ALIVE if not isinstance(mutant.tests, Parity)]


def _suites() -> list[tuple[str, str, str]]:
    """Returns (file, marker, -k expression) of all tests that mutants run in an inner pytest, each file once."""
    chosen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for mutant in NESTED:
        file, _, expression = mutant.tests
        chosen[file, mutant.killed_by].add(f"({expression})")
    return [(*key, " or ".join(sorted(expressions))) for key, expressions in chosen.items()]


@pytest.mark.parametrize(
    ("file", "marker", "chosen"), [pytest.param(*each, id=Path(each[0]).stem) for each in _suites()]
)
def test_without_a_mutant_the_suite_is_green(file: str, marker: str, chosen: str, tmp_path: Path) -> None:
    outcome = nested.run((file, "-k", chosen), marker, tmp_path)
    assert not outcome.failed, "\n\n".join(failure.text for failure in outcome.failed.values())
    assert outcome.passed


@dosed(NESTED)
def test_a_mutant_is_killed_and_named_where_it_is(mutant: Mutant, dose: float | None, tmp_path: Path) -> None:
    require_killed(mutant, dose, tmp_path)


def test_every_bug_that_was_seen_is_in_the_catalogue_once() -> None:
    numbers = Counter(mutant.number for mutant in MUTANTS if mutant.number is not None)
    assert numbers == Counter(range(1, 51))


def test_mutants_have_unique_names() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
