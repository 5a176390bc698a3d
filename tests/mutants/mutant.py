"""What a mutant is: a deliberate porting bug, and what the suite has to say about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

# pytest's arguments: a file, "-k", and which tests of it.
Tests = tuple[str, str, str]


class Parity(NamedTuple):
    """Parity of one embedded case in float32, which is called directly.

    Attributes:
      case: its name.
      backward: whether gradients are judged; else the forward pass.
    """

    case: str
    backward: bool = False

    @property
    def tests(self) -> Tests:
        """The tests of the suite that make the same check."""
        file = "test_gradients" if self.backward else "test_parity"
        return (f"vit_ref/testing/suite/{file}.py", "-k", f"{self.case}-float32")


def forward(case: str) -> Parity:
    """Forward parity of one embedded case."""
    return Parity(case)


def backward(case: str) -> Parity:
    """Backward parity of one embedded case."""
    return Parity(case, backward=True)


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
      tests: the check that must fail: parity of one case, or tests that pytest runs; few, so that a mutant takes
        seconds.
      compiled: whether compiling decides if the bug is there. Forward parity then compiles the model, as it does for
        users; else it runs operation by operation, which takes a fifth of the time and computes the same.
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
    tests: Parity | Tests = ONE_BLOCK
    compiled: bool = False
    first_site: str | None = None
    says: str = "first divergence at {site}:"
    cause: str | tuple[str | None, ...] | None = None
    equivalent: str | None = None

    def cause_at(self, dose: float | None) -> str | None:
        """What the diagnosis must suggest at this dose."""
        return self.cause[self.doses.index(dose)] if isinstance(self.cause, tuple) else self.cause
