"""Does parity kill every bug that it should see, and name its site?

These mutants have their own file. jax's cache of single operations then serves all of them, as long as no test between
them needs a fresh compiler.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import pytest

from tests.mutants import direct, nested
from tests.mutants.killing import ALIVE, dosed, require_killed
from tests.mutants.mutant import ONE_BLOCK, Mutant, Parity, backward
from vit_ref.model import vit

# What is run with a fault in it, other tests run without: to measure it here would take a tenth of the time.
pytestmark = pytest.mark.no_cover

JUDGED = [mutant for mutant in ALIVE if isinstance(mutant.tests, Parity)]
COMPILED = [mutant for mutant in JUDGED if mutant.compiled or mutant.tests.backward]


@pytest.mark.parametrize(
    "parity",
    sorted({mutant.tests for mutant in JUDGED}),
    ids=lambda parity: parity.case + "-backward" * parity.backward,
)
def test_parity_passes_without_a_mutant(parity: Parity) -> None:
    outcome = direct.judge(parity)
    assert not outcome.failed, outcome.failed
    assert outcome.passed


@dosed([mutant for mutant in JUDGED if mutant not in COMPILED])
def test_parity_kills_and_names_a_mutant(mutant: Mutant, dose: float | None, tmp_path: Path) -> None:
    require_killed(mutant, dose, tmp_path)


@dosed(COMPILED)
def test_parity_kills_and_names_a_mutant_that_is_compiled(mutant: Mutant, dose: float | None, tmp_path: Path) -> None:
    require_killed(mutant, dose, tmp_path)


@pytest.mark.parametrize("parity", [ONE_BLOCK, backward("rectangular")], ids=["forward", "backward"])
def test_pytest_fails_as_a_direct_check_does(parity: Parity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(vit.ACTIVATIONS, "gelu", functools.partial(jax.nn.gelu, approximate=True))
    (found,) = direct.judge(parity).failed.values()
    by_pytest = nested.run(parity.tests, "parity", tmp_path)
    assert by_pytest.failed
    for failure in by_pytest.failed.values():
        # A compiled model rounds differently: the site is the same, but the last digits of the error are not.
        _, _, expected = found.text.splitlines()[0].partition(": first divergence at ")
        assert f": first divergence at {expected.partition(':')[0]}:" in failure.text
