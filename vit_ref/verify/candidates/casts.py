"""Casts to float32 in a candidate's forward pass, which are undone where the candidate is asked for float64.

A softmax or a norm that is widened to float32, or a layer that carries that dtype, narrows float64. The rounding is the
candidate's precision and not its formula. The semantic gate would hide a wrong formula behind it, so the casts are
undone there; the numerical gate judges them, untouched, in the tested precision.
"""

from __future__ import annotations

from typing import Any

from vit_ref.verify.compare.trace import Tap


class Casts:
    """What was undone in one forward pass.

    Args:
      who: the candidate or the reference, for the report.

    Attributes:
      number: how many casts.
      before: the first site that was shown after the first cast; "" without any.
    """

    def __init__(self, who: str = "candidate") -> None:
        self._who = who
        self.number = 0
        self.before = ""

    def watching(self, tap: Tap) -> Tap:
        """The same tap, which tells this object how far the forward pass is."""

        def passed(site: str, value: Any) -> Any:
            if self.number and not self.before:
                self.before = site
            return tap(site, value)

        return passed

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report says of it, in one line or none."""
        if not self.number:
            return ()
        casts = "a cast" if self.number == 1 else f"{self.number} casts"
        return (
            f"the {self._who} makes {casts} of float64 to float32, the first before {self.before}: undone for the"
            " float64 gate, because that rounding is no formula, and judged in the tested precision. A layer that"
            " carries a dtype gets it from load(checkpoint, dtype)",
        )
