"""Undoes a candidate's casts to float32 when it is run in float64.

A softmax or a norm that is widened to float32, or a layer that carries that dtype, narrows float64. That rounding is
the candidate's precision and not its formula. The semantic gate could not see a wrong formula behind it, so the casts
are undone there. The numerical gate tests the candidate with its casts, in the tested precision.
"""

from __future__ import annotations

from typing import Any

from vit_ref.verify.compare.trace import Tap


class Casts:
    """The casts that were undone in one forward pass.

    Args:
      who: the candidate or the reference, for the report.

    Attributes:
      number: the number of casts.
      before: the first site that was shown after the first cast; "" if there was no cast.
    """

    def __init__(self, who: str = "candidate") -> None:
        self._who = who
        self.number = 0
        self.before = ""

    def watching(self, tap: Tap) -> Tap:
        """Returns a tap that also tells this object which site the forward pass has reached.

        Args:
          tap: the tap to call.
        """

        def passed(site: str, value: Any) -> Any:
            if self.number and not self.before:
                self.before = site
            return tap(site, value)

        return passed

    @property
    def notes(self) -> tuple[str, ...]:
        """The report's note about the casts, in one line or none."""
        if not self.number:
            return ()
        casts = "a cast" if self.number == 1 else f"{self.number} casts"
        return (
            f"the {self._who} makes {casts} from float64 to float32, the first before {self.before}. This rounding"
            " is undone for the float64 gate, because it is not part of a formula; the tested precision keeps it. To"
            " give a layer its dtype, use load(checkpoint, dtype)",
        )
