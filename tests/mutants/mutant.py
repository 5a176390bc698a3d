"""A mutant: a deliberate porting bug, and what the suite must report about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

# pytest's arguments: a file, "-k", and an expression that selects its tests.
Tests = tuple[str, str, str]


class Parity(NamedTuple):
    """Parity of one embedded case in float32, which is called directly.

    Attributes:
      case: the case's name.
      backward: whether to compare gradients; else the forward pass.
    """

    case: str
    backward: bool = False

    @property
    def tests(self) -> Tests:
        """The tests of the suite that make the same check."""
        file = "test_gradients" if self.backward else "test_parity"
        return (f"vit_ref/testing/suite/{file}.py", "-k", f"{self.case}-float32")


def forward(case: str) -> Parity:
    """Returns forward parity of one embedded case."""
    return Parity(case)


def backward(case: str) -> Parity:
    """Returns backward parity of one embedded case."""
    return Parity(case, backward=True)


# The case has rectangular images, three heads and one block. If one block shows the bug, a second one only costs time
# to compile.
ONE_BLOCK = forward("stored-float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A deliberate bug in the candidate under test, never in the reference.

    Attributes:
      name: its id.
      story: what went wrong, and in whose code.
      source: where it was seen, or why it can happen.
      inject: puts the bug in through a monkeypatch, with the dose if there are doses.
      number: its number among the bugs seen in public ports; None for the others.
      doses: sizes of the bug, the smallest last. Each must be caught.
      killed_by: the marker whose tests must fail.
      tests: the check that must fail: parity of one case, or tests that pytest runs. They are few, so that a mutant
        takes seconds.
      compiled: whether the bug exists only when the model is compiled. Forward parity then compiles the model, as for
        users. Otherwise it runs operation by operation, which is faster and computes the same.
      first_site: the first site, gradient or tensor that the report must name; None if this kind of bug has none.
      says: the text with which the report names it.
      cause: the only cause that the diagnosis must suggest, one per dose if there are doses; None if it must suggest
        none.
      equivalent: why no input can distinguish the mutant from the right model. Then nothing is run.
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
        """Returns the cause that the diagnosis must suggest at this dose."""
        return self.cause[self.doses.index(dose)] if isinstance(self.cause, tuple) else self.cause
