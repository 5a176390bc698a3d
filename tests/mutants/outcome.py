"""What came of a check that was made of a model with a mutant in it."""

from __future__ import annotations

from typing import NamedTuple


class Failure(NamedTuple):
    """How a check failed: with what, and the text that a person would read."""

    error: type[BaseException]
    text: str


class Outcome(NamedTuple):
    """The failures by check, and how many checks passed."""

    failed: dict[str, Failure]
    passed: int
