"""Rounding against its gates, and rounding on nearby inputs if bad luck may explain an error.

Nearby inputs differ by a few units of rounding. The formulas see the same numbers there, and each error is drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.compare.inputs import Inputs, is_float, is_same, map_arrays
from vit_ref.verify.compare.protocols import Observable, Reference
from vit_ref.verify.compare.trace import require_float64
from vit_ref.verify.gates import Errors, Truth, errors_of, numerical_gate, pool
from vit_ref.verify.precision import FLOAT64, Precision

# One operation may carry the whole error of a site and round right every second time. Over so many further inputs a
# reference is lucky each time less than once in a hundred. A norm over two channels, right in both frameworks, erred by
# 5.5e-8 or 1.2e-6, whichever framework it was.
NEARBY = 7
# Few enough that values stay as ill-conditioned as they are, and enough that each is rounded anew.
_UNITS = 8


class Rounding(NamedTuple):
    """The rounding of reference and candidate, by site in the order of the pass.

    Attributes:
      reference: the reference's errors, with their carriers.
      candidate: the candidate's errors. A site that it does not show is missing.
      precision: the tested precision.
      foreign: see `numerical_gate`.
      nearby: on how many inputs beside the given ones the errors were measured too. Errors are pooled over all of them.
    """

    reference: Errors
    candidate: Errors
    precision: Precision
    foreign: bool
    nearby: int = 0

    def gate(self, site: str, most: float = math.inf) -> float:
        """Returns the gate of a site.

        Args:
          site: the site.
          most: the largest count of carriers.
        """
        own = self.reference[site]
        return numerical_gate(own.rms, self.precision.dtype, min(own.carriers, most), foreign=self.foreign)

    @property
    def beyond(self) -> str | None:
        """The first site whose error is beyond its gate."""
        shown = (site for site in self.reference if site in self.candidate)
        return next((site for site in shown if self.candidate[site].rms > self.gate(site)), None)

    def may_be_luck(self, site: str, carriers: float) -> bool:
        """Tells whether an error beyond its gate can be the bad luck of the few tokens that carry it.

        The gate allows for the luck of as many tokens as carry the reference's error. That is too little if the
        reference was lucky at the one token where right implementations err most.

        Args:
          site: the site of the error.
          carriers: how many tokens carry the candidate's error.
        """
        return self.candidate[site].rms <= self.gate(site, carriers)


def nearby_inputs(inputs: Inputs, precision: Precision) -> list[Any]:
    """Returns inputs beside the given ones; none if there is nothing to move.

    Whole numbers stay as they are, because they may be masks or token ids. Others move towards zero, so that what lay
    within bounds still does.

    Args:
      inputs: the inputs.
      precision: the tested precision, whose unit of rounding is the measure.
    """
    most = _UNITS * precision.epsilon

    def moved(value: NDArray) -> NDArray:
        if not is_float(value):
            return value
        nearer = value * (1 - most * rng.random(value.shape))
        return np.where(value == np.trunc(value), value, nearer).astype(value.dtype)

    found = []
    for seed in range(NEARBY):
        rng = np.random.default_rng(seed)
        found.append(map_arrays(moved, inputs))
    return [] if is_same(found[0], inputs) else found


def measure_nearby(inputs: Inputs, reference: Reference, candidate: Observable, first: Rounding) -> Rounding:
    """Returns rounding pooled over the given inputs and over those beside them for which the reference is finite.

    Args:
      inputs: the given inputs.
      reference: the implementation that decides.
      candidate: the implementation under test.
      first: the rounding on the given inputs.
    """
    own, theirs = [first.reference], [first.candidate]
    for nearby in nearby_inputs(inputs, first.precision):
        truth = reference.trace(nearby, FLOAT64)
        require_float64(truth, reference.name)
        truths = {site: Truth(truth[site]) for site in first.reference}
        errors = errors_of(reference.trace(nearby, first.precision), truths, carriers=True)
        if all(math.isfinite(error.rms) for error in errors.values()):
            own.append(errors)
            theirs.append(errors_of(candidate.trace(nearby, first.precision), truths))
    return first._replace(reference=_pooled(own), candidate=_pooled(theirs), nearby=len(own) - 1)


def _pooled(found: Sequence[Errors]) -> Errors:
    return {site: pool([errors[site] for errors in found]) for site in found[0]}
