"""What a mutant is: a deliberate porting bug, and what the suite has to say about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

Tests = tuple[str, str, str]


def forward(case: str) -> Tests:
    """pytest's arguments for forward parity of one embedded case."""
    return ("tests/parity/test_parity.py", "-k", f"{case}-float32")


def backward(case: str) -> Tests:
    """pytest's arguments for backward parity of one embedded case."""
    return ("tests/parity/test_gradients.py", "-k", f"{case}-float32")


# Rectangular images, three heads, one block: where one block tells, a second one compiles for as long again.
ONE_BLOCK = forward("stored-float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A deliberate bug in the port under test, never in what judges it.

    Attributes:
      name: its id.
      story: what went wrong in whose port.
      source: where it was seen, or why it can happen.
      inject: puts the bug in through the monkeypatch that it is given, and the dose where there are doses.
      number: its number in the catalogue of bugs that were seen in public ports; None for the others.
      doses: sizes of the bug, the smallest last. Each must be caught.
      killed_by: the marker whose tests must fail.
      tests: pytest's arguments: a file, "-k", and which tests of it; few, so that a mutant takes seconds.
      first_site: the first site, gradient or tensor that the report must name; None where the kind of bug has none.
      says: how the report names it.
      cause: the one thing that the diagnosis must suggest, for each dose where there are doses; None where nothing.
      equivalent: why no input can tell the mutant from the truth. Then nothing is run.
    """

    name: str
    story: str
    source: str
    inject: Callable[..., None] = lambda monkeypatch: None
    number: int | None = None
    doses: tuple[float, ...] = ()
    killed_by: str = "parity"
    tests: Tests = ONE_BLOCK
    first_site: str | None = None
    says: str = "first divergence at {site}:"
    cause: str | tuple[str | None, ...] | None = None
    equivalent: str | None = None

    def cause_at(self, dose: float | None) -> str | None:
        """What the diagnosis must suggest at this dose."""
        return self.cause[self.doses.index(dose)] if isinstance(self.cause, tuple) else self.cause
