"""The outcome of a check of a model with a mutant in it."""

from __future__ import annotations

from typing import NamedTuple


class Failure(NamedTuple):
    """How a check failed: the exception, and the text for the reader."""

    error: type[BaseException]
    text: str


class Outcome(NamedTuple):
    """The failures by check, and the number of checks that passed."""

    failed: dict[str, Failure]
    passed: int
