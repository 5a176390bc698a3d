"""Checks that a mutant is killed: its check fails, for the right reason, and names the right site."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from tests.mutants import direct, nested
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant, Parity
from tests.mutants.outcome import Outcome
from vit_ref.errors import InputError

# Exceptions of a test that found something wrong. A TypeError, for example, would mean a bad injection.
RIGHT_REASONS = (AssertionError, pytest.fail.Exception, InputError, FloatingPointError)

ALIVE = [mutant for mutant in MUTANTS if not mutant.equivalent]


def dosed(mutants: list[Mutant]) -> pytest.MarkDecorator:
    """Parametrizes a test by mutant and dose."""
    return pytest.mark.parametrize(
        ("mutant", "dose"),
        [
            pytest.param(mutant, dose, id=mutant.name if dose is None else f"{mutant.name}-{dose:g}")
            for mutant in mutants
            for dose in mutant.doses or (None,)
        ],
    )


def require_killed(mutant: Mutant, dose: float | None, scratch: Path) -> None:
    """Puts the mutant in, runs its check, and asserts that the check fails as it should.

    Args:
      mutant: the mutant.
      dose: its dose, if it has doses.
      scratch: a directory for temporary files.
    """
    inject = mutant.inject if dose is None else functools.partial(mutant.inject, dose=dose)
    with pytest.MonkeyPatch.context() as monkeypatch:
        inject(monkeypatch)
        outcome = _checked(mutant, scratch)
    assert outcome.failed, f"{mutant.name} survives: {mutant.story}"
    text = "\n\n".join(failure.text for failure in outcome.failed.values())
    wrong = [failure.error for failure in outcome.failed.values() if not _found_something(failure.error)]
    assert not wrong, f"killed by a clumsy injection, {wrong}:\n{text}"
    if mutant.first_site:
        assert mutant.says.format(site=mutant.first_site) in text, text
    suggested = set(re.findall(r"likely cause: (.*): the same bug in the oracle", text))
    cause = mutant.cause_at(dose)
    assert suggested == ({cause} if cause else set()), text


def _checked(mutant: Mutant, scratch: Path) -> Outcome:
    if isinstance(mutant.tests, Parity):
        return direct.judge(mutant.tests, compiled=mutant.compiled)
    return nested.run(mutant.tests, mutant.killed_by, scratch)


def _found_something(error: type[BaseException]) -> bool:
    # jax reports a leaked tracer as a plain Exception.
    return issubclass(error, RIGHT_REASONS) or error is Exception
